"""Folders of speech: .wav files, and what is said in them."""

import wave
from math import gcd
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from ..errors import LrkvError
from .pairs import Corpus, Pair, text_of

RATE = 16000  # samples a second that speech models hear
TRANSCRIPTS = "transcripts.tsv"
TOKENS_PER_SECOND = 4  # of speech, where no transcript says how many


def read_speech(folder: str) -> Corpus:
    """Every .wav in a folder, by name. Raises LrkvError for sound of another kind, and for a folder
    without any.
    """
    path = Path(folder)
    files = (
        sorted(file for file in path.glob("*") if file.suffix.lower() == ".wav")
        if path.is_dir()
        else []
    )
    if not files:
        raise LrkvError(
            f"{folder} is no folder of .wav files",
            "give one with x.wav and, for its transcript, x.txt beside it, or transcripts.tsv",
        )
    texts = _transcripts(path / TRANSCRIPTS)
    return Corpus(
        path.resolve().name,
        [Pair(file.name, read_wav(file), _transcript(file, texts)) for file in files],
    )


def read_wav(file: Path) -> Tensor:
    """Samples (n,) float32 in [-1, 1) at RATE; other rates are resampled. Raises LrkvError for
    anything but one channel of 16 bits.
    """
    try:
        with wave.open(str(file)) as sound:
            channels, width, rate, samples = (
                sound.getnchannels(),
                sound.getsampwidth(),
                sound.getframerate(),
                sound.readframes(sound.getnframes()),
            )
    except (wave.Error, EOFError, OSError) as error:
        raise LrkvError(
            f"cannot read {file.name}: {error or 'it ends too soon'}",
            f"convert it: ffmpeg -i IN -ac 1 -ar {RATE} -c:a pcm_s16le OUT.wav",
        ) from error
    if (channels, width) != (1, 2) or not samples:
        found = f"{channels} channel(s) of {8 * width} bits" if samples else "no sound"
        raise LrkvError(
            f"{file.name} has {found}, not one channel of 16 bits",
            f"convert it: ffmpeg -i IN -ac 1 -ar {RATE} -c:a pcm_s16le OUT.wav",
        )
    heard = np.frombuffer(samples[: len(samples) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
    if rate != RATE:
        heard = resample_poly(heard, RATE // gcd(rate, RATE), rate // gcd(rate, RATE)).astype(
            np.float32
        )
    return torch.from_numpy(heard)


def _transcripts(file: Path) -> dict[str, str]:
    """name -> text of a table, {} where there is none."""
    if not file.is_file():
        return {}
    lines = [line.partition("\t") for line in text_of(file).splitlines() if line.strip()]
    if bad := next((name for name, tab, text in lines if not tab or not text.strip()), None):
        raise LrkvError(
            f"{file.name}: no transcript after {bad!r}",
            "a line is the name of a .wav, a tab and what is said",
        )
    return {name.removesuffix(".wav"): text.strip() for name, _, text in lines}


def _transcript(file: Path, texts: dict[str, str]) -> str | None:
    beside = file.with_suffix(".txt")
    return texts.get(file.stem) or (text_of(beside).strip() or None if beside.is_file() else None)
