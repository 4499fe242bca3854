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

# a quarter of the bytes as codes, as a plan of mha-rope-6m with 8 x 32 heads has them in its middle
# layers: these many of 256 numbers have these many bits
PLANNED = {8: 16, 6: 72, 4: 64, 3: 40, 2: 32}
# without three bits, which have a plane of their own
PLANNED_25 = {8: 16, 6: 72, 4: 88, 2: 56}
# 37.5 and 50 %
PLANNED_37 = {8: 64, 6: 112, 4: 56, 2: 16}
PLANNED_50 = {8: 256}


def coded(
    heads: int,
    groups: int,
    head_dim: int,
    rotary: bool,
    form: str = "joint",
    together: int | None = None,
    planned: dict[int, int] = PLANNED,
) -> Shape:
    """Keys and values as codes in these proportions; together: heads that share them, None for
    all.
    """
    together = together or heads
    blocks = [
        (bits, round(count * together * head_dim / 256 / 8) * 8) for bits, count in planned.items()
    ]
    size = sum(count for _, count in blocks), 0
    codes = blocks, None
    return Shape(
        heads,
        groups,
        head_dim,
        size,
        size,
        form,
        rotary,
        codes=(codes, codes),
        head_groups=heads // together,
    )


def coded_per_head(heads: int, groups: int, head_dim: int) -> Shape:
    """The same in the residuals of each head, keys under RoPE; values as `coded`."""
    blocks = [(bits, round(count * head_dim / 256 / 8) * 8) for bits, count in PLANNED.items()]
    size, joint = (0, sum(count for _, count in blocks)), coded(heads, groups, head_dim, True)
    codes = (None, blocks), joint.codes[1]
    return Shape(heads, groups, head_dim, size, joint.values, rotary=True, codes=codes)


# what about half of the cache is for each form of keys, and a quarter where they are codes
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
    "codes position-free": coded(32, 1, 128, False),
    "codes RoPE joint": coded(32, 1, 128, True),
    "codes RoPE per-head": coded_per_head(32, 1, 128),
    "codes GQA position-free": coded(8, 4, 128, False),
    "codes GQA RoPE joint": coded(8, 4, 128, True),
    "codes position-free, groups of 4": coded(32, 1, 128, False, together=4, planned=PLANNED_25),
    "codes RoPE commuting": coded(32, 1, 128, True, "turning", planned=PLANNED_25),
    "codes RoPE commuting, groups of 8": coded(32, 1, 128, True, "turning", 8, planned=PLANNED_25),
    "codes RoPE commuting, groups of 4": coded(32, 1, 128, True, "turning", 4, planned=PLANNED_25),
    "codes RoPE commuting, groups of 1": coded(32, 1, 128, True, "turning", 1, planned=PLANNED_25),
    "codes RoPE commuting, groups of 4, 37 %": coded(32, 1, 128, True, "turning", 4, PLANNED_37),
    "codes RoPE commuting, groups of 4, 50 %": coded(32, 1, 128, True, "turning", 4, PLANNED_50),
    "codes RoPE channels": coded(32, 1, 128, True, "channels", planned=PLANNED_37),
    "codes GQA RoPE commuting": coded(8, 4, 128, True, "turning", planned=PLANNED_25),
    "codes GQA RoPE commuting, groups of 2": coded(
        8, 4, 128, True, "turning", 2, planned=PLANNED_25
    ),
    "codes GQA RoPE commuting, groups of 1": coded(
        8, 4, 128, True, "turning", 1, planned=PLANNED_25
    ),
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
        f"{'shape':<42}{'dtype':>9}{'batch':>6}{'tokens':>7} "
        f" {'path':<18}{'ms':>9}{'faster':>8}{'cache':>7}{'limit ms':>9}{'of limit':>9}"
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
                f"{name:<42}{dtype:>9}{batch:>6}{tokens:>7} "
                f" {row['path']:<18}{row['milliseconds']:>9.2f}"
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
