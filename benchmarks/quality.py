"""What each way of converting costs in quality, side by side in one run.

    python benchmarks/quality.py MODEL --calibration TEXT... --text TEXT... [--json FILE]

Converts MODEL in every way below, measures all of them on the first --tokens tokens of each text, and prints a table in Markdown.
Nothing is tuned on the texts it measures on; give others than those of --calibration.
"""
import argparse
import datetime
import platform
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from lrkv_convert import convert
from lrkv_convert.calibrate import read_texts
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import compare, load_tokenizer
from lrkv_convert.writer import write_json

GIVEN, BUILT_IN, NONE = "given", "built-in", "none"
WAYS = [    # (label, calibration text, options)
    ("`--cache-ratio 0.58`", GIVEN, {"cache_ratio": 0.58}),
    ("default: half the cache", GIVEN, {}),
    ("`--cache-ratio 0.42`", GIVEN, {"cache_ratio": 0.42}),
    ("default: half the cache", BUILT_IN, {}),
    ("`--rank 16`", GIVEN, {"rank": 16}),
    ("`--rank-k 8 --rank-v 24`", GIVEN, {"rank_k": 8, "rank_v": 24}),
    ("`--rank-k 8 --rank-v 24`", BUILT_IN, {"rank_k": 8, "rank_v": 24}),
    ("`--rank 16 --base aligned`", GIVEN, {"rank": 16, "base": "aligned"}),
    ("`--rank 16 --base mean`", GIVEN, {"rank": 16, "base": "mean"}),
    ("`--rank 16 --base mean --calibration none`", NONE, {"rank": 16, "base": "mean"}),
    ("`--cache-ratio 0.58 --keys per-head`", GIVEN, {"cache_ratio": 0.58, "keys": "per-head"}),
    ("`--cache-ratio 0.58 --keys rotary`", GIVEN, {"cache_ratio": 0.58, "keys": "rotary"}),
    ("`--cache-ratio 0.75 --keys full`", GIVEN, {"cache_ratio": 0.75, "keys": "full"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=8704, help="of each text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    device, tokenizer = pick_device("auto"), load_tokenizer(args.model)
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, (label, calibration, options) in enumerate(WAYS):
            texts = {GIVEN: args.calibration, BUILT_IN: None, NONE: []}[calibration]
            done = convert(args.model, Path(folder) / str(i), calibration=texts, dtype="float32", device=str(device), **options)
            rows.append({"way": label, "calibration": calibration, "seconds": done.record["seconds"], "peak_memory_bytes": done.record["peak_memory_bytes"],
                         "kflop": done.plan.flops_after / 1e3})
            print(f"# {label} ({calibration}): {done.record['seconds']:.0f} s", flush=True)
        for text in read_texts(args.text):
            results.append(compare([args.model, *(str(Path(folder) / str(i)) for i in range(len(WAYS)))], text, max_tokens=args.tokens,
                                   device=device, dtype=torch.float32))
    tokens = sum(r["tokens"] for r in results)
    pooled = lambda i, key: sum(r["models"][i][key] * r["tokens"] for r in results) / tokens
    base = pooled(0, "nll")
    print(f"\n| conversion | calibration | cache | kflop to read a token | perplexity ratio | {' | '.join(r['text']['name'] for r in results)} | KL |")
    print("|---|---|---|---|---|" + "---|" * (len(results) + 1))
    for i, row in enumerate(rows, 1):
        row |= {"kv_ratio": results[0]["models"][i]["kv_ratio"], "ratio": float(torch.tensor(pooled(i, "nll") - base).exp()), "kl": pooled(i, "kl"),
                "ratio_per_text": [r["models"][i]["ratio"] for r in results]}
        each = " | ".join(f"×{x:.3f}" for x in row["ratio_per_text"])
        print(f"| {row['way']} | {row['calibration']} | {row['kv_ratio']:.1%} | {row['kflop']:,.0f} | **×{row['ratio']:.3f}** | {each} | {row['kl']:.3f} |")
    print(f"\n{tokens:,} tokens predicted, windows of 512, float32, {device}; original perplexity {float(torch.tensor(base).exp()):.2f}")
    if args.json:
        write_json(args.json, {
            "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "model": Path(args.model).name, "calibration": [{"name": t.name, "sha256": t.sha256} for t in read_texts(args.calibration)],
            "texts": [r["text"] for r in results], "tokens": tokens, "base_nll": base, "rows": rows})


if __name__ == "__main__":
    main()
