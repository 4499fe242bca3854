"""Everything that wants a GPU, in one call: is the kernel right, how fast is it, and conversion,
perplexity, decoding and healing of a real model.

    python benchmarks/gpu.py --out DIR [--model FOLDER --text FILE [--data FILE... --tokens N]]
    [--shapes NAME...] [--quick]

Writes one JSON per step into DIR as soon as the step is done (kernel.json, decode.json, model.json,
heal.json), so that a call cut short keeps what it measured; with --quick, small sizes. Steps that
fail are reported at the end and do not stop the others.
"""

import argparse
import sys
import traceback
from pathlib import Path

import torch
from decode import SHAPES, measure
from environment import environment

from lrkv_convert import convert
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import bench, compare
from lrkv_convert.evaluate.step import Layer
from lrkv_convert.examples.text import read_texts
from lrkv_convert.folder.writer import write_json
from lrkv_convert.healing import heal
from lrkv_convert.modeling import kernel_lrkv, reference

TOLERANCE = 1e-2  # of the root mean square, bfloat16 against float64


@torch.no_grad()
def kernel_errors(
    names: list[str], device: torch.device, tokens: list[int], dtype: torch.dtype
) -> list[dict]:
    """Root mean square error against the float64 reference, relative, of the kernel and of the
    split path, for those shapes of these names that the kernel knows.
    """
    rows = []
    for name in names:
        shape = SHAPES[name]
        if not shape.in_kernel:
            continue
        for batch, length in [(1, n) for n in tokens] + [(3, tokens[0])]:
            layer = Layer(shape, batch, length, device, dtype)
            query = layer.query.view(batch, shape.heads, shape.groups, shape.head_dim)
            given = dict(
                keys=layer.keys,
                values=layer.values,
                query=query,
                cached_keys=layer.cached[0],
                cached_values=layer.cached[1],
                rotation=layer.rotation,
                mask=None,
                scale=layer.scaling,
            )
            expected, found = reference.decode(**given), kernel_lrkv.decode(**given)
            split = layer.run("split").reshape(found.shape)  # (N, 1, H G, d), for one token
            error, beside = (
                ((each.double() - expected).square().mean() / expected.square().mean())
                .sqrt()
                .item()
                for each in (found, split)
            )
            rows.append(
                {
                    "shape": name,
                    "batch": batch,
                    "tokens": length,
                    "error": error,
                    "split_error": beside,
                    "right": error < TOLERANCE,
                }
            )
            print(
                f"{name:<24} batch {batch} tokens {length:>6}  error {error:.2e}"
                f" (split {beside:.2e})  {'right' if rows[-1]['right'] else 'WRONG'}",
                flush=True,
            )
    return rows


def model_steps(model: str, text: str, out: Path, device: torch.device, quick: bool) -> dict:
    """Convert to codes at a quarter of the cache, to numbers at half of it and with full keys,
    compare perplexity, decode.
    """
    folders, records = [], {}
    for name, options in (
        ("quarter", {}),
        ("half", {"bits": 16}),
        ("full", {"keys": "full"}),
    ):
        done = convert(
            model,
            out / name,
            device=str(device),
            overwrite=True,
            calibration_tokens=1024 if quick else None,
            **options,
        )
        folders.append(str(out / name))
        records[name] = {
            key: getattr(done.record, key)
            for key in ("seconds", "seconds_per_stage", "peak_memory_bytes")
        }
    quality = compare(
        [model, *folders],
        read_texts([text]),
        max_tokens=1024 if quick else 17408,
        batch_size=4,
        device=device,
    )
    speed = bench(
        [model, *folders],
        tokens=[64] if quick else [2048, 8000],
        batches=[1] if quick else [1, 8, 32],
        routes=["auto", "split", "rebuild"],
        device=device,
        dtype=torch.bfloat16,
    )
    for row in speed["rows"]:
        print(
            f"{row['model']:<14} {row['path']:<13} batch {row['batch']:>2} tokens"
            f" {row['tokens']:>6} {row['milliseconds']:8.2f} ms  x{row['speedup']:.2f}",
            flush=True,
        )
    for row in quality["models"]:
        print(f"{row['path']:<40} perplexity x{row['ratio']:.4f}", flush=True)
        row["path"] = Path(row["path"]).name
    return {
        "conversion": records,
        "quality": quality,
        "bench": {**speed, "models": [Path(m).name for m in speed["models"]]},
    }


def heal_step(
    model: str,
    text: str,
    data: list[str],
    tokens: int,
    out: Path,
    device: torch.device,
    quick: bool,
) -> dict:
    """Convert to numbers at half the cache, calibrated on the data, heal, compare on the text."""
    half, healed = out / "heal-from", out / "healed"
    convert(
        model,
        half,
        device=str(device),
        overwrite=True,
        calibration=data,
        bits=16,
        calibration_tokens=1024 if quick else None,
    )
    size = (
        {"tokens": 4096, "validation_tokens": 512}
        if quick
        else {
            "tokens": tokens,
            "micro_batch_size": 4,
            "batch_size": 8,
            "validate_every": 50,
            "checkpoint_every": 200,
        }
    )
    done = heal(
        half,
        healed,
        data,
        device=str(device),
        overwrite=True,
        tracker="none",
        **size,
        report=lambda line: (
            print(
                f"step {line['step']} of {line['steps']}: held out x{line['validation_ratio']:.4f},"
                f" {line['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
            if "validation_ratio" in line
            else None
        ),
    )
    quality = compare(
        [model, str(half), str(healed)],
        read_texts([text]),
        max_tokens=1024 if quick else 17408,
        batch_size=4,
        device=device,
        dtype=torch.float32,
    )
    for row in quality["models"]:
        print(f"{row['path']:<40} perplexity x{row['ratio']:.4f}  KL {row['kl']:.4f}", flush=True)
        row["path"] = Path(row["path"]).name
    return {"healing": {**done.entry.to_json(), "teacher": Path(model).name}, "quality": quality}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="to heal on")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, failed = pick_device(args.device), []
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokens = [63, 130] if args.quick else [63, 1000, 8191, 32768]
    steps = {
        "kernel": lambda: {"rows": kernel_errors(args.shapes, device, tokens, dtype)},
        "decode": lambda: measure(
            args.shapes,
            [str(dtype).removeprefix("torch.")],
            [1] if args.quick else [1, 8, 32],
            [128] if args.quick else [2048, 8192, 32768],
            3 if args.quick else 20,
            65536,
            device,
        ),
    }
    if args.model and args.text:
        steps["model"] = lambda: model_steps(args.model, args.text, args.out, device, args.quick)
    if args.model and args.text and args.data:
        steps["heal"] = lambda: heal_step(
            args.model, args.text, args.data, args.tokens, args.out, device, args.quick
        )
    for name, step in steps.items():
        try:
            result = step()
            write_json(args.out / f"{name}.json", {**environment(device), **result})
            if not all(row.get("right", True) for row in result.get("rows", [])):
                failed.append(name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all steps done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
