"""Where a conversion spends its time and memory, beside one plain forward pass over the calibration
tokens, in one run.

    python benchmarks/convert.py MODEL [--calibration TEXT...] [--cache-ratio 0.5] [--json FILE]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from environment import environment
from transformers.utils import logging

from lrkv_convert import convert
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import load_model, load_tokenizer
from lrkv_convert.examples.text import BUILT_IN, read_texts, window_length, windows
from lrkv_convert.folder.writer import write_json


@torch.no_grad()
def forward_seconds(
    model: str, calibration: list[str] | None, tokens: int, device: torch.device
) -> float:
    """One forward pass of the original, as transformers loads it, over the calibration windows: the
    faster of 1 and 4 windows at a time.
    """
    loaded = load_model(model, device, torch.float32)
    rows = windows(
        read_texts([BUILT_IN] if calibration is None else calibration),
        load_tokenizer(model),
        window_length(loaded.config),
        tokens,
    )
    taken = []
    for batch in (1, 4):
        loaded(rows[:batch].to(device), use_cache=False)  # warm up
        began = time.perf_counter()
        for part in rows.split(batch):
            loaded(part.to(device), use_cache=False).logits.sum().item()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--cache-ratio", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    device = pick_device(args.device)
    # first, so that the peak is the conversion's own
    with tempfile.TemporaryDirectory() as folder:
        record = convert(
            args.model,
            Path(folder) / "out",
            cache_ratio=args.cache_ratio,
            calibration=args.calibration,
            device=str(device),
            calibration_tokens=args.calibration_tokens,
        ).record
    forward = forward_seconds(args.model, args.calibration, args.calibration_tokens, device)
    print(f"{'stage':<12}{'seconds':>9}{'forwards':>10}")
    for stage, seconds in {
        **record.seconds_per_stage,
        "total": record.seconds,
        "one forward": forward,
    }.items():
        print(f"{stage:<12}{seconds:>9.1f}{seconds / forward:>10.2f}")
    print(
        f"peak memory {record.peak_memory_bytes / 2**30:.2f} GiB;"
        f" {record.calibration.tokens:,} calibration tokens, {device},"
        f" {torch.get_num_threads()} threads"
    )
    if args.json:
        write_json(
            args.json,
            {
                **environment(device),
                "model": Path(args.model).name,
                "calibration_tokens": record.calibration.tokens,
                "forward_seconds": round(forward, 1),
                "ratio": round(record.seconds / forward, 2),
                **{
                    k: getattr(record, k)
                    for k in ("seconds", "seconds_per_stage", "peak_memory_bytes")
                },
            },
        )


if __name__ == "__main__":
    main()
