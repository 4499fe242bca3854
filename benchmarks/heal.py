"""What healing gives back: optimisers, losses and starts side by side, on the same tokens in the
same order.

    python benchmarks/heal.py MODEL --data TEXT... --text TEXT... --out DIR [--calibration TEXT...]
    [--tokens N] [--tune-tokens N] [--batch-size N]

Converts MODEL three times into one shape (joint fit; mean of the heads and SVD of the residuals,
without calibration; random factors), heals each way in ROWS and measures all of it on the first
--test-tokens tokens of each --text. Learning rates are chosen first, for every row alike, from
--scales times those of the recipe `short`, by the perplexity of text held out of --data after
--tune-tokens. Writes DIR/heal.json and DIR/heal.png; prints a table in Markdown. Rows that are done
are kept in DIR: the same command goes on after them.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from environment import environment
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lrkv_convert import convert
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import compare, load_model
from lrkv_convert.examples.text import read_texts
from lrkv_convert.folder.writer import write_json
from lrkv_convert.healing import heal
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.train.options import Options

ROWS = [  # (label, start, options)
    ("Muon + AdamW, KL, joint fit", "joint", {}),
    ("AdamW, KL, joint fit", "joint", {"optimizer": "adamw"}),
    ("Muon + AdamW, cross-entropy, joint fit", "joint", {"loss": "ce"}),
    ("Muon + AdamW, KL, mean base and SVD", "mean", {}),
    ("Muon + AdamW, KL, random factors", "random", {}),
]
NEAR = 1.5  # ratios below this are drawn once more by themselves
STARTS = {"joint": {}, "mean": {"base": "mean", "calibration": []}}  # options of convert


def start(
    name: str, model: str, folder: Path, shape: dict, calibration: list[str] | None, device: str
) -> Path:
    """The converted folder that healing starts from."""
    if name == "random":
        joint = start("joint", model, folder, shape, calibration, device)
        out = folder / "start-random"
        if not out.exists():
            shutil.copytree(joint, folder / "unfinished", dirs_exist_ok=True)
            randomise(folder / "unfinished")
            (folder / "unfinished").rename(out)
        return out
    out = folder / f"start-{name}"
    if not out.exists():
        convert(
            model,
            out,
            device=device,
            dtype="float32",
            **{"calibration": calibration, **shape, **STARTS[name]},
        )
    return out


def randomise(folder: Path) -> None:
    """Draw all factors as in a model that is built from its config alone."""
    torch.manual_seed(0)
    # what was loaded would not be drawn anew
    built = AutoModelForCausalLM.from_config(load_model(str(folder), torch.device("cpu")).config)
    drawn = {
        f"{name}.{key}": value.contiguous()
        for name, module in built.named_modules()
        if isinstance(module, LowRankHeads)
        for key, value in module.state_dict().items()
    }
    save_file(
        load_file(folder / "model.safetensors") | drawn,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def run(
    label: str, source: Path, out: Path, data: list[str], scale: float, device: str, **options
) -> tuple[dict, list[dict]]:
    """(history entry, log) of one healing; what lies there already is read."""
    rates = Options()
    if not out.exists():
        heal(
            source,
            out,
            data,
            device=device,
            overwrite=True,
            tracker="none",
            muon_lr=rates.muon_lr * scale,
            adamw_lr=rates.adamw_lr * scale,
            **options,
            report=lambda line: (
                print(
                    f"# {label} x{scale:g}: step {line['step']} of {line['steps']}, held out"
                    f" x{line['validation_ratio']:.4f}, {line['tokens_per_second']:.0f} tokens/s",
                    flush=True,
                )
                if "validation_ratio" in line
                else None
            ),
        )
    entry = json.loads((out / "lrkv.json").read_text())["history"][-1]
    return entry, [json.loads(line) for line in (out / "heal.jsonl").read_text().splitlines()]


def draw(rows: list[dict], file: Path, per_step: int) -> None:
    """All rows on the left, those that come near the original once more on the right."""
    from lrkv_convert.plot import MARKERS, pyplot

    figure, (every, near) = pyplot.subplots(1, 2, figsize=(11, 5), dpi=130, layout="constrained")
    for row, marker, colour in zip(
        rows, MARKERS, pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    ):
        for axes in (every, near) if row["curve"][-1][1] < NEAR else (every,):
            axes.plot(
                [step * per_step for step, _ in row["curve"]],
                [ratio for _, ratio in row["curve"]],
                marker=marker,
                color=colour,
                label=row["way"],
            )
    every.set_yscale("log")
    for axes, form in ((every, "×{:g}"), (near, "×{:.2f}")):
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda y, _, form=form: form.format(y))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("tokens trained on")
        axes.grid(True, which="both", linewidth=0.4)
    every.set_ylabel("held-out perplexity, relative to the original")
    figure.legend(*every.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file)


def tuned(row: tuple[str, str, dict], i: int, source: Path, args) -> dict[float, float]:
    """Held-out loss after --tune-tokens, by the scale of the learning rates."""
    label, _, options = row
    tried = {}
    for scale in args.scales:
        entry, _ = run(
            f"tuning {label}",
            source,
            args.out / f"tune-{i}-{scale:g}",
            args.data,
            scale,
            args.device,
            tokens=args.tune_tokens,
            checkpoint_every=10**6,
            validate_every=10**6,
            **size(args),
            **options,
        )
        tried[scale] = entry["validation"]["nll"]["healed"]
    return tried


def healed(row: tuple[str, str, dict], i: int, source: Path, args) -> tuple[Path, dict]:
    """A row of ROWS, the i-th, healed by its best learning rates: the folder, and what is kept."""
    label, name, options = row
    tried = tuned(row, i, source, args)
    best, out = min(tried, key=tried.get), args.out / f"healed-{i}"
    entry, log = run(
        label,
        source,
        out,
        args.data,
        best,
        args.device,
        tokens=args.tokens,
        validate_every=max(1, args.tokens // per_step(args) // 8),
        checkpoint_every=10**6,
        **size(args),
        **options,
    )
    checks = [line for line in log if "validation_ratio" in line]
    return out, {
        "way": label,
        "start": name,
        "scale": best,
        "muon_lr": entry["recipe"]["muon_lr"],
        "adamw_lr": entry["recipe"]["adamw_lr"],
        "tuning": {f"{s:g}": nll for s, nll in tried.items()},
        "tokens": entry["tokens"],
        "seconds": entry["seconds"],
        "curve": [[line["step"], line["validation_ratio"]] for line in checks],
    }


def size(args) -> dict:
    """What every row reads in a step, and holds out."""
    return {"batch_size": args.batch_size, "validation_tokens": 4096}


def per_step(args) -> int:
    """Tokens."""
    return args.batch_size * Options().seq_len


def table(rows: list[dict], folders: list[Path], models: dict[str, dict]) -> None:
    """Add to each row what was measured before and after (folders, two a row), and print all."""
    print(
        "\n| healing | learning rates | before | after | of the lost log-perplexity | KL after |"
        " tokens/s |\n|---|---|---|---|---|---|---|"
    )
    for i, row in enumerate(rows):
        before, after = (models[str(path)] for path in folders[2 * i : 2 * i + 2])
        row |= {
            "before": before["ratio"],
            "after": after["ratio"],
            "regained": 1 - math.log(after["ratio"]) / math.log(before["ratio"]),
            "kl": after["kl"],
        }
        alone = "AdamW," in row["way"] and "Muon" not in row["way"]
        rates = f"{row['adamw_lr']:g}" if alone else f"{row['muon_lr']:g} / {row['adamw_lr']:g}"
        print(
            f"| {row['way']} | {rates} | ×{row['before']:.3f} | **×{row['after']:.3f}** |"
            f" {row['regained']:.0%} | {row['kl']:.3f} | {row['tokens'] / row['seconds']:.0f} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", nargs="+")
    parser.add_argument("--rank-k", type=int, default=6)
    parser.add_argument("--rank-v", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--tune-tokens", type=int, default=8192)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=2,
        help="windows per step: small, so that few tokens make enough steps",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.3, 1, 3])
    parser.add_argument("--test-tokens", type=int, default=8704, help="of each text")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = {"rank_k": args.rank_k, "rank_v": args.rank_v}
    rows, folders = [], []
    for i, row in enumerate(ROWS):
        source = start(row[1], args.model, args.out, shape, args.calibration, args.device)
        out, found = healed(row, i, source, args)
        folders += [source, out]
        rows.append(found)
    result = compare(
        [args.model, *dict.fromkeys(map(str, folders))],
        read_texts(args.text),
        max_tokens=args.test_tokens,
        device=pick_device(args.device),
        dtype=torch.float32,
    )
    table(rows, folders, {row["path"]: row for row in result["models"]})
    print(
        f"\n{rows[0]['tokens']:,} tokens trained on, {result['tokens']:,} tokens predicted, windows"
        " of 512"
    )
    write_json(
        args.out / "heal.json",
        {
            **environment(pick_device(args.device)),
            "model": Path(args.model).name,
            "shape": shape,
            "batch_size": args.batch_size,
            "data": [{"name": t.name, "sha256": t.sha256} for t in read_texts(args.data)],
            "texts": result["texts"],
            "test_tokens": result["tokens"],
            "rows": rows,
        },
    )
    draw(rows, args.out / "heal.png", per_step(args))


if __name__ == "__main__":
    main()
