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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LrkvError
from .text import BUILT_IN, read_texts


@dataclass(frozen=True)
class Pair:
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
    examples: list[Pair]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(
            "".join(example.sha256 for example in self.examples).encode()
        ).hexdigest()


def text_of(file: Path) -> str:
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
            Pair(f"{text.name}:{i + 1}", paragraph)
            for text in texts
            for i, paragraph in enumerate(_paragraphs(text.content))
        ]
        return _filled(path if path == BUILT_IN else Path(path).name, found)
    found = []
    for number, line in enumerate(text_of(Path(path)).splitlines(), 1):
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
        found.append(Pair(f"{Path(path).name}:{number}", source, target or None))
    return _filled(Path(path).name, found)


def _filled(name: str, examples: list[Pair]) -> Corpus:
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
