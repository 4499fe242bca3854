"""One attention step of decoding at several lengths and batches: attention on the full cache (SDPA)
beside each path of LRKV, side by side.

    python benchmarks/decode.py [--tokens 2048 8192 32768] [--batch 1 4] [--dtype float32 bfloat16]
    [--shapes NAME ...] [--json FILE]

All shapes have 32 query heads of width 128. `limit` is the time it takes to move the bytes of the
cache once at the rate of a plain copy here (read plus written); `of limit` says how near the step
comes.
"""

import argparse
import itertools
from pathlib import Path

import torch
from environment import environment

from lrkv_convert.device import pick_device
from lrkv_convert.evaluate.step import Shape, attention_step, bandwidth
from lrkv_convert.folder.writer import write_json

# what about half of the cache is for each form of keys
SHAPES = {
    "position-free": Shape(32, 1, 128, (128, 60), (128, 60)),
    "RoPE joint": Shape(32, 1, 128, (128, 60), (128, 60), rotary=True),
    "RoPE joint, C = I": Shape(32, 1, 128, (128, 60), (128, 60), rotary=True, alignment=False),
    "RoPE per-head": Shape(32, 1, 128, (0, 64), (128, 60), rotary=True),
    "RoPE rotary": Shape(32, 1, 128, (128, 60), (128, 60), form="rotary", rotary=True),
    # values at a quarter
    "RoPE full": Shape(32, 1, 128, (0, 128), (128, 28), form="full", rotary=True),
    "GQA position-free": Shape(8, 4, 128, (128, 48), (128, 48)),
    "GQA RoPE joint": Shape(8, 4, 128, (128, 48), (128, 48), rotary=True),
}


def measure(
    shapes: list[str],
    dtypes: list[str],
    batches: list[int],
    lengths: list[int],
    rounds: int,
    rebuild_up_to: int,
    device: torch.device,
) -> dict:
    """Time and print every combination; returns the rows and the rate of a plain copy."""
    rate, rows = bandwidth(device), []
    print(f"plain copy: {rate / 1e9:.1f} GB/s read plus written")
    print(
        f"{'shape':<19}{'dtype':>9}{'batch':>6}{'tokens':>7} "
        f" {'path':<11}{'ms':>9}{'faster':>8}{'cache':>7}{'limit ms':>9}{'of limit':>9}"
    )
    for name, dtype, batch, tokens in itertools.product(shapes, dtypes, batches, lengths):
        for row in attention_step(
            SHAPES[name],
            batch,
            tokens,
            device,
            getattr(torch, dtype),
            rounds,
            batch * tokens <= rebuild_up_to,
            rate,
        ):
            print(
                f"{name:<19}{dtype:>9}{batch:>6}{tokens:>7} "
                f" {row['path']:<11}{row['milliseconds']:>9.2f}"
                f"{'x' + format(row['speedup'], '.2f'):>8}"
                f"{row['cache_ratio']:>7.0%}{row['limit_milliseconds']:>9.2f}"
                f"{row['of_limit']:>9.0%}",
                flush=True,
            )
            rows.append({"shape": name, **row})
    return {"copy_bytes_per_second": rate, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--rebuild-up-to",
        type=int,
        default=8192,
        help="batch times tokens up to which the rebuild path is timed as well",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    result = measure(
        args.shapes, args.dtype, args.batch, args.tokens, args.rounds, args.rebuild_up_to, device
    )
    if args.json:
        write_json(args.json, {**environment(device), **result})


if __name__ == "__main__":
    main()
