"""What an encoder-decoder reads, and what it is to write: folders of speech with transcripts, pairs
of texts, or texts alone.

    speech    a folder of .wav files (one channel, 16 bits), a transcript in x.txt beside x.wav or
              in transcripts.tsv (name<tab>text a line), or none
    pairs     .jsonl, a {"source": ..., "target": ...} a line, the target may be missing
    text      .txt, .md or a folder of them: its paragraphs are sources without targets

Where a target is missing, the model's own writing is taken (writing.py).
"""

import hashlib
import json
import wave
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from ..errors import LrkvError
from .text import BUILT_IN, read_texts

RATE = 16000  # samples a second that speech models hear
TRANSCRIPTS = "transcripts.tsv"
TOKENS_PER_SECOND = 4  # of speech, where no transcript says how many


@dataclass(frozen=True)
class Example:
    """One thing to read. source: samples (n,) float32 at RATE of speech, or a text; target: what is
    to be written, None where nobody has said.
    """

    name: str
    source: Tensor | str
    target: str | None = None

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(
            self.source.encode() if isinstance(self.source, str) else self.source.numpy().tobytes()
        )
        digest.update(b"\0" + (self.target or "").encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Examples that belong together: a folder of speech, a file of pairs."""

    name: str
    examples: list[Example]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(
            "".join(example.sha256 for example in self.examples).encode()
        ).hexdigest()


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
        [Example(file.name, read_wav(file), _transcript(file, texts)) for file in files],
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
    lines = [line.partition("\t") for line in _text(file).splitlines() if line.strip()]
    if bad := next((name for name, tab, text in lines if not tab or not text.strip()), None):
        raise LrkvError(
            f"{file.name}: no transcript after {bad!r}",
            "a line is the name of a .wav, a tab and what is said",
        )
    return {name.removesuffix(".wav"): text.strip() for name, _, text in lines}


def _transcript(file: Path, texts: dict[str, str]) -> str | None:
    beside = file.with_suffix(".txt")
    return texts.get(file.stem) or (_text(beside).strip() or None if beside.is_file() else None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise LrkvError(f"cannot read {file}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise LrkvError(f"{file} is not UTF-8 text", "convert it, or give another") from error


def read_pairs(path: str) -> Corpus:
    """A .jsonl file of pairs; or texts, of which every paragraph is a source; BUILT_IN for the text
    that ships here. Raises LrkvError.
    """
    if any(file.suffix.lower() == ".wav" for file in Path(path).glob("*")):
        raise LrkvError(
            f"{path} is a folder of speech, and this model reads text",
            "give a .jsonl file of pairs, or texts",
        )
    if Path(path).suffix != ".jsonl":
        texts = read_texts([path])
        found = [
            Example(f"{text.name}:{i + 1}", paragraph)
            for text in texts
            for i, paragraph in enumerate(_paragraphs(text.content))
        ]
        return _filled(path if path == BUILT_IN else Path(path).name, found)
    found = []
    for number, line in enumerate(_text(Path(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LrkvError(
                f"{path}, line {number}: not JSON", 'a line is {"source": "...", "target": "..."}'
            ) from error
        source, target = (
            (row.get(name) for name in ("source", "target"))
            if isinstance(row, dict)
            else (None, None)
        )
        if not isinstance(source, str) or not source.strip() or not isinstance(target, str | None):
            raise LrkvError(
                f'{path}, line {number}: no text under "source"',
                'a line is {"source": "...", "target": "..."}; the target may be missing',
            )
        found.append(Example(f"{Path(path).name}:{number}", source, target or None))
    return _filled(Path(path).name, found)


def _filled(name: str, examples: list[Example]) -> Corpus:
    if not examples:
        raise LrkvError(
            f"{name} holds nothing to read",
            'give pairs, a {"source": "...", "target": "..."} a line, or a text with paragraphs',
        )
    return Corpus(name, examples)


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of a text, each on one line; those of a word or two are headings and left out."""
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    return [block for block in blocks if block.count(" ") > 2]


def spread(sizes: list[int], budget: int) -> list[int]:
    """Indices of as many things of these sizes as fit the budget together, about, evenly over all;
    at least one.
    """
    count = min(len(sizes), max(1, int(len(sizes) * budget / max(1, sum(sizes)))))
    return torch.linspace(0, len(sizes) - 1, count).round().long().tolist()
