"""What LRKV costs a speech model: conversions of decoder self-attention, of cross-attention and of both at several sizes of their caches, beside the original
on speech none of them was calibrated on.

    python benchmarks/whisper.py MODEL --calibration-text FILE --text FILE --out DIR [--json FILE]

MODEL is a Whisper folder. Sentences of the texts are spoken by espeak-ng, in several voices and speeds, so that anyone can make the same sounds; they are
unlike a person's, and word error rates against the text say so. DIR gets the speech and, while it is measured, one converted model.
"""
import argparse
import datetime
import json
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
from lrkv_convert.report import version
from lrkv_convert.seq2seq.compare import compare
from lrkv_convert.seq2seq.data import read_speech
from lrkv_convert.writer import write_json

VOICES, SPEEDS = ("en-us", "en-gb", "en-us+f3", "en-gb+m3", "en-us+m7", "en-gb+f4", "en-gb-scotland"), (130, 145, 160, 175)
WORDS = range(8, 26)        # of a sentence
POINTS = {"uniform": {"rank_k": 10, "rank_v": 32, "base_width": 64}, "0.495": {"cache_ratio": 0.495}, "0.29": {"cache_ratio": 0.29}}


def sentences(file: Path, count: int) -> list[str]:
    """So many sentences of a text, spread evenly over it."""
    text = " ".join(file.read_text(encoding="utf-8").replace("_", "").replace("--", ", ").split())
    found = [s for s in re.findall(r"[A-Z][^.!?\"“”]*[.!?]", text) if len(s.split()) in WORDS and not re.search(r"\b[A-Z]{2,}|\d|\b(?:Mr|Mrs|Dr|St)\.$", s)]
    return [found[i] for i in torch.linspace(0, len(found) - 1, min(count, len(found))).round().long().tolist()]


def speak(folder: Path, lines: list[str]) -> Path:
    """A .wav and a transcript per sentence, each in another voice or speed than the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, line in enumerate(lines):
        subprocess.run(["espeak-ng", "-v", VOICES[i % len(VOICES)], "-s", str(SPEEDS[i % len(SPEEDS)]), "-w", folder / f"{i:03}.wav", line], check=True)
        (folder / f"{i:03}.txt").write_text(line + "\n", encoding="utf-8")
    return folder
