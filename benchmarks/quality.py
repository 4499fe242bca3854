"""What each way of converting to 16-bit numbers costs in quality, side by side in one run; codes
of fewer bits are in frontier.py.

    python benchmarks/quality.py MODEL --calibration TEXT... --text TEXT... [--json FILE]

Converts MODEL in every way below, measures all of them on the first --tokens tokens of each text,
and prints a table in Markdown. Nothing is tuned on the texts it measures on; give others than those
of --calibration.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path

import torch
from environment import environment
from transformers.utils import logging

from lrkv_convert.conversion import plan_budgets, uniform_plans
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate.load import load_model, load_tokenizer
from lrkv_convert.evaluate.perplexity import Candidate, measure, text_windows
from lrkv_convert.examples.text import read_texts
from lrkv_convert.folder.store import Store
from lrkv_convert.folder.writer import write_json
from lrkv_convert.frontier import build
from lrkv_convert.modeling import auto_class
from lrkv_convert.plan.options import Options
from lrkv_convert.study import Study

GIVEN, BUILT_IN, NONE = "given", "built-in", "none"
WAYS = [  # (label, calibration text, options)
    ("`--bits 16 --cache-ratio 0.58`", GIVEN, {"bits": "16", "cache_ratio": 0.58}),
    ("`--bits 16`: half the cache", GIVEN, {"bits": "16"}),
    ("`--bits 16 --cache-ratio 0.42`", GIVEN, {"bits": "16", "cache_ratio": 0.42}),
    ("`--bits 16`: half the cache", BUILT_IN, {"bits": "16"}),
    ("`--bits 16 --cache-ratio 0.58`", BUILT_IN, {"bits": "16", "cache_ratio": 0.58}),
    ("`--rank 16`", GIVEN, {"rank": 16}),
    ("`--rank-k 8 --rank-v 24`", GIVEN, {"rank_k": 8, "rank_v": 24}),
    ("`--rank-k 8 --rank-v 24`", BUILT_IN, {"rank_k": 8, "rank_v": 24}),
    ("`--rank 16 --base aligned`", GIVEN, {"rank": 16, "base": "aligned"}),
    ("`--rank 16 --base mean`", GIVEN, {"rank": 16, "base": "mean"}),
    (
        "`--rank 16 --base mean --calibration none`",
        NONE,
        {"rank": 16, "base": "mean", "calibration": []},
    ),
    (
        "`--bits 16 --cache-ratio 0.58 --keys per-head`",
        GIVEN,
        {"bits": "16", "cache_ratio": 0.58, "keys": "per-head"},
    ),
    ("`--cache-ratio 0.58 --keys rotary`", GIVEN, {"cache_ratio": 0.58, "keys": "rotary"}),
    ("`--cache-ratio 0.75 --keys full`", GIVEN, {"cache_ratio": 0.75, "keys": "full"}),
]


class Workbench:
    """One calibration per set of texts, and the original beside everything converted from it.

    stored: dtype whose bytes plans count; metrics: those that something is fitted in. All models
    run in float32.
    """

    def __init__(
        self,
        model: str,
        given: list[str],
        tokens: int | None,
        device: torch.device,
        folder: Path,
        stored: torch.dtype = torch.float32,
        metrics: Collection[str] = ("fisher",),
    ):
        self.study = Study(model)
        self.study.build(device)
        auto = auto_class(self.study.family.model_type)
        self.original = load_model(model, device, torch.float32, auto)
        self.tokens, self.folder, self.stored, self.metrics = tokens, folder, stored, metrics
        self.texts = {GIVEN: given, BUILT_IN: [BUILT_IN]}

    @cache  # noqa: B019  (one object, as long as the process)
    def store(self, calibration: str) -> Store:
        store, study = Store(self.folder / calibration, {}), self.study
        if calibration != NONE:
            asked = None if calibration == BUILT_IN else self.texts[calibration]
            options = Options(calibration=asked, calibration_tokens=self.tokens)
            study.gather(self.texts[calibration], options.tokens_of(study.family))
            study.read()
            study.observe(self.metrics, store)
        return store

    def convert(self, calibration: str, fields: dict):
        """(plans by kind of attention, model): what `lrkv convert` with these options writes, in
        memory and float32.
        """
        store, study = self.store(calibration), self.study
        options = Options(**fields).for_family(study.family)
        options.check(study.sites, study.config)
        plans = uniform_plans(study, options, self.stored) or plan_budgets(
            study, options, self.stored, store
        )
        metric = "attention" if calibration == NONE else options.metric
        model = build(self.original, study, plans, metric, store, options.base, options.refit)
        return plans, model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=8704, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, help="default: what lrkv convert reads")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    device, tokenizer, results = pick_device("auto"), load_tokenizer(args.model), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(
            args.model, args.calibration, args.calibration_tokens, device, Path(folder)
        )
        rows, models = [], [bench.original]
        for label, calibration, options in WAYS:
            began = time.perf_counter()
            plans, model = bench.convert(calibration, options)
            plan = plans["self"]
            models.append(model)
            rows.append(
                {
                    "way": label,
                    "calibration": calibration,
                    "kv_ratio": plan.ratio,
                    "kflop": plan.flops_after / 1e3,
                }
            )
            print(f"# {label} ({calibration}): {time.perf_counter() - began:.0f} s", flush=True)
        for text in read_texts(args.text):
            ids = torch.tensor(
                tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
            )[: args.tokens]
            scores = measure([Candidate(model) for model in models], text_windows(ids, 512))
            results.append(
                {
                    "text": {"name": text.name, "sha256": text.sha256},
                    "tokens": scores[0].tokens,
                    "models": [{"nll": s.mean("nll"), "kl": s.mean("kl")} for s in scores],
                }
            )
    tokens = sum(r["tokens"] for r in results)
    pooled = lambda i, key: sum(r["models"][i][key] * r["tokens"] for r in results) / tokens
    base = pooled(0, "nll")
    print(
        "\n| conversion | calibration | cache | kflop to read a token | perplexity ratio |"
        f" {' | '.join(r['text']['name'] for r in results)} | KL |"
    )
    print("|---|---|---|---|---|" + "---|" * (len(results) + 1))
    for i, row in enumerate(rows, 1):
        row |= {
            "ratio": math.exp(pooled(i, "nll") - base),
            "kl": pooled(i, "kl"),
            "ratio_per_text": [
                math.exp(r["models"][i]["nll"] - r["models"][0]["nll"]) for r in results
            ],
        }
        each = " | ".join(f"×{x:.3f}" for x in row["ratio_per_text"])
        print(
            f"| {row['way']} | {row['calibration']} | {row['kv_ratio']:.1%} | {row['kflop']:,.0f} |"
            f" **×{row['ratio']:.3f}** | {each} | {row['kl']:.3f} |"
        )
    print(
        f"\n{tokens:,} tokens predicted, windows of 512, float32, {device}; original perplexity"
        f" {math.exp(base):.2f}; the original reads a token back with"
        f" {plan.flops_before / 1e3:,.0f} kflop"
    )
    if args.json:
        write_json(
            args.json,
            {
                **environment(device),
                "model": Path(args.model).name,
                "calibration": [
                    {"name": t.name, "sha256": t.sha256} for t in read_texts(args.calibration)
                ],
                "texts": [r["text"] for r in results],
                "tokens": tokens,
                "base_nll": base,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
