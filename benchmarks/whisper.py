"""What LRKV costs a speech model: conversions of decoder self-attention, of cross-attention and of
both at several sizes of their caches, beside the original on speech none of them was calibrated on.

    python benchmarks/whisper.py MODEL --calibration-text FILE --text FILE --out DIR [--json FILE]

MODEL is a Whisper folder. Sentences of the texts are spoken by espeak-ng, in several voices and
speeds, so that anyone can make the same sounds; they are unlike a person's, and word error rates
against the text say so. DIR gets the speech and the converted models.
"""

import argparse
import datetime
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
import transformers

from lrkv_convert import LrkvError, convert
from lrkv_convert.device import pick_device
from lrkv_convert.evaluate import compare
from lrkv_convert.examples.speech import read_speech
from lrkv_convert.folder.companions import version
from lrkv_convert.folder.writer import write_json

VOICES, SPEEDS = (
    (
        "en-us",
        "en-gb",
        "en-us+f3",
        "en-gb+m3",
        "en-us+m7",
        "en-gb+f4",
        "en-gb-scotland",
    ),
    (130, 145, 160, 175),
)
WORDS = range(8, 26)  # of a sentence
# the same in every layer, base one head wide
RANKS = {"49.5 %": {"rank_k": 10, "rank_v": 32}, "29 %": {"rank_k": 4, "rank_v": 12}}
BUDGETS = {
    "49.5 %": {"cache_ratio": 0.495, "bits": 16},
    "29 %": {"cache_ratio": 0.29, "bits": 16},
}
# a few bits a latent, shares of a bfloat16 cache
CODES = {
    name: {"cache_ratio": r, "dtype": "bfloat16"} for name, r in (("25 %", 0.25), ("12.5 %", 0.125))
}
POINTS = [
    (attention, name, how, options)
    for attention in ("self", "cross", "self,cross")
    for how, table in (("codes", CODES), ("planned", BUDGETS), ("uniform", RANKS))
    for name, options in table.items()
    if not (attention == "self,cross" and how == "uniform")
]


def sentences(file: Path, count: int) -> list[str]:
    """So many sentences of a text, spread evenly over it."""
    text = " ".join(file.read_text(encoding="utf-8").replace("_", "").replace("--", ", ").split())
    found = [
        s
        for s in re.findall(r"[A-Z][^.!?\"“”]*[.!?]", text)
        if len(s.split()) in WORDS and not re.search(r"\b[A-Z]{2,}|\d|\b(?:Mr|Mrs|Dr|St)\.$", s)
    ]
    return [
        found[i]
        for i in torch.linspace(0, len(found) - 1, min(count, len(found))).round().long().tolist()
    ]


def speak(folder: Path, lines: list[str]) -> Path:
    """A .wav and a transcript per sentence, each in another voice or speed than the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, line in enumerate(lines):
        subprocess.run(
            [
                "espeak-ng",
                "-v",
                VOICES[i % len(VOICES)],
                "-s",
                str(SPEEDS[i % len(SPEEDS)]),
                "-w",
                folder / f"{i:03}.wav",
                line,
            ],
            check=True,
        )
        (folder / f"{i:03}.txt").write_text(line + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a Whisper model")
    parser.add_argument(
        "--calibration-text",
        type=Path,
        required=True,
        help="text whose sentences are spoken to calibrate on",
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="another, whose sentences are measured on"
    )
    parser.add_argument("--calibration-sentences", type=int, default=80)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for speech and converted models"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if not shutil.which("espeak-ng"):
        raise LrkvError("espeak-ng is not installed", "apt-get install espeak-ng")
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    calibration = speak(
        args.out / "calibration", sentences(args.calibration_text, args.calibration_sentences)
    )
    measured = speak(args.out / "measured", sentences(args.text, args.sentences))
    models = []
    for attention, size, how, options in POINTS:
        folder = args.out / f"{attention.replace(',', '-')}-{how}-{size.split()[0]}"
        done = convert(
            args.model,
            folder,
            attention=attention,
            calibration=[str(calibration)],
            overwrite=True,
            **options,
        )
        models.append(
            {"attention": attention, "cache": size, "how": how, "seconds": done.record.seconds}
        )
        print(f"{attention} {how} {size}: {done.record.seconds:.0f} s", flush=True)
    result = compare(
        [
            args.model,
            *(
                str(
                    args.out
                    / f"{m['attention'].replace(',', '-')}-{m['how']}-{m['cache'].split()[0]}"
                )
                for m in models
            ),
        ],
        [read_speech(str(measured))],
        device=pick_device("cpu"),
    )
    kept = (
        "self_ratio",
        "cross_ratio",
        "tokens",
        "perplexity",
        "ratio",
        "ratio_low",
        "ratio_high",
        "kl",
        "top1_agreement",
        "words",
        "same_words",
        "same_texts",
        "word_error_rate",
    )
    base, *rows = result["models"]
    record = {
        "model": Path(args.model).resolve().name,
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {torch.get_num_threads()} thread(s)",
        "versions": {
            "lrkv_convert": version("lrkv-convert"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "espeak_ng": (
                subprocess.run(
                    ["espeak-ng", "--version"], capture_output=True, text=True
                ).stdout.split()[3]
            ),
        },
        "calibration": {
            "text": args.calibration_text.name,
            "sentences": len(read_speech(str(calibration)).examples),
        },
        "measured": {
            "text": args.text.name,
            "sentences": result["examples"],
            "tokens": result["tokens"],
            "words": base["words"],
        },
        "seconds": round(time.perf_counter() - began),
        "original": {name: base[name] for name in kept},
        "models": [
            {**model, **{name: row[name] for name in kept}} for model, row in zip(models, rows)
        ],
    }
    for row in record["models"]:
        print(
            f"{row['attention']:10} {row['how']:8} {row['cache']:7} ×{row['ratio']:.4f}"
            f" ({row['ratio_low']:.3f}–{row['ratio_high']:.3f})  KL {row['kl']:.4f}  same words"
            f" {row['same_words']:.1%}  WER {row['word_error_rate']:.1%}"
        )
    print(
        f"original: perplexity {base['perplexity']:.3f}, WER {base['word_error_rate']:.1%};"
        f" {base['words']:,} words; {record['seconds']} s in all"
    )
    if args.json:
        write_json(args.json, record)


if __name__ == "__main__":
    main()
