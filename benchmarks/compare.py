"""What `lrkv compare` costs: beside two plain forward passes over the same text, of the two models,
or both of the original.

    python benchmarks/compare.py MODEL DIR --text FILE [--windows N] [--json FILE]

A plain pass is `model(ids)` and nothing else. Window by window the contenders take turns, so that a
noisy machine is noisy for all; medians count.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from environment import environment
from transformers.utils import logging

from lrkv_convert.device import pick_device, pick_dtype
from lrkv_convert.evaluate import load_model, load_tokenizer
from lrkv_convert.evaluate.perplexity import Candidate, measure, text_windows
from lrkv_convert.examples.text import read_texts
from lrkv_convert.folder.writer import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    device = pick_device(args.device)
    [text] = read_texts([args.text])
    ids = torch.tensor(
        load_tokenizer(args.model)(text.content, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    )[: 512 * (args.windows + 1)]
    original, converted = (
        load_model(path, device, pick_dtype(args.dtype)) for path in (args.model, args.folder)
    )

    @torch.no_grad()
    def plain(*models):
        for model in models:
            model(window.ids.to(device), use_cache=False)

    ways = {
        "plain passes, both of the original": lambda: plain(original, original),
        "plain passes, of the two models": lambda: plain(original, converted),
        "lrkv compare": lambda: measure([Candidate(original), Candidate(converted)], [window]),
    }
    taken = {name: [] for name in ways}
    for window in text_windows(ids, 512):  # noqa: B007  (ways read it)
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(time.perf_counter() - began)
    # the first window warms up
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    rows = [
        {"way": name, "seconds": seconds, "compare_to_this": medians["lrkv compare"] / seconds}
        for name, seconds in medians.items()
    ]
    for row in rows:
        print(
            f"{row['way']:<36} {row['seconds']:7.3f} s per window   compare takes"
            f" x{row['compare_to_this']:.2f}"
        )
    if args.json:
        write_json(
            args.json,
            {
                **environment(device),
                "model": Path(args.model).name,
                "dtype": args.dtype,
                "windows": args.windows,
                "seq_len": 512,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
