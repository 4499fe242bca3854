"""What an encoder reads and what its decoder writes -> examples on disk, the same in every process
and after every restart.

Each corpus comes in an order of the seed, all of them side by side, each as far in proportion as
the others, until there are enough tokens: no more is read, or written by a model, than is trained
on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import LrkvError
from ..examples.example import Example, digest
from ..examples.pairs import Corpus, Pair
from ..examples.prepare import prepare
from ..examples.reader import Reader
from ..folder.writer import write_json
from .data import Data, held_out

FILE, ABOUT = "examples-{:05d}.safetensors", "examples.json"
AT_ONCE = 64  # examples made at a time, and kept in a file
PREDICTS = "predicts"  # beside the names of a model's arguments


@dataclass(frozen=True)
class Pairs(Data):
    """folder: where they are; lengths (n, 2): tokens that the decoder reads, and how many of its
    predictions count; written: targets that a model wrote.
    """

    folder: Path
    lengths: Tensor
    written: int

    def examples(self, indices: Tensor) -> list[Example]:
        return [self._example(i) for i in indices.tolist()]

    def _example(self, i: int) -> Example:
        with safe_open(self.folder / FILE.format(i // AT_ONCE), "pt") as file:
            names = [n for n in file.keys() if n.startswith(f"{i}.")]  # noqa: SIM118  (no dict)
            found = {name.partition(".")[2]: file.get_tensor(name) for name in names}
        return Example({n: t for n, t in found.items() if n != PREDICTS}, found[PREDICTS])

    def tokens_of(self, indices: Tensor) -> int:
        return int(self.lengths[indices, 0].sum())

    def predicted_of(self, indices: Tensor) -> int:
        return int(self.lengths[indices, 1].sum())

    def record(self) -> dict:
        counts = {"examples": len(self.training), "targets_by_the_model": self.written}
        return super().record() | counts


class Filler:
    """Makes examples and writes them to a folder as they come.

    load: makes the model that writes what is missing. Afterwards `lengths` is that of `Pairs`,
    `written` too, and `digest` has the sha256 of all.
    """

    def __init__(self, folder: Path, reader: Reader, load: Callable[[], PreTrainedModel]):
        self.folder, self.reader, self.load = folder, reader, load
        self.lengths: list[tuple[int, int]] = []
        self.waiting: list[Example] = []
        self.written, self.digest = 0, hashlib.sha256()

    def fill(self, what: str, corpora: list[Corpus], tokens: int, seed: int) -> int:
        """As many examples as have that many decoder tokens together, or all; how many they are.
        what: name of the data. Raises LrkvError for what the model cannot read.
        """
        first, left, pairs = len(self.lengths), tokens, side_by_side(corpora, seed)
        while left > 0 and (some := list(islice(pairs, AT_ONCE))):
            made = prepare([Corpus(what, some)], self.reader, None, self.load)
            for example, reference in zip(made.examples(), made.references):
                if left > 0:
                    self._add(example)
                    self.written += reference is None
                    left -= example.tokens
        return len(self.lengths) - first

    def _add(self, example: Example) -> None:
        self.lengths.append((example.tokens, int((example.predicts >= 0).sum())))
        self.digest.update(str(digest([example])).encode())
        self.waiting.append(example)
        if len(self.waiting) == AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        first = len(self.lengths) - len(self.waiting)
        tensors = {
            f"{i}.{name}": tensor.contiguous()
            for i, example in enumerate(self.waiting, first)
            for name, tensor in (*example.inputs.items(), (PREDICTS, example.predicts))
        }
        if tensors:
            save_file(tensors, self.folder / FILE.format(first // AT_ONCE))
        self.waiting = []


def side_by_side(corpora: list[Corpus], seed: int) -> Iterator[Pair]:
    """The pairs of all corpora, of each in an order drawn from the seed."""
    ranked = []
    for n, corpus in enumerate(corpora):
        order = torch.randperm(
            len(corpus.examples), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        ranked += [((at + 1) / len(order), n, corpus.examples[i]) for at, i in enumerate(order)]
    return (pair for *_, pair in sorted(ranked, key=lambda ranking: ranking[:2]))


def fill(
    corpora: list[Corpus],
    held: list[Corpus] | None,
    filler: Filler,
    *,
    tokens: int,
    validation_tokens: int,
    seed: int,
) -> None:
    """Write what `filled` reads. held: what is held out; None: some of the corpora. Raises
    LrkvError for what the model cannot read, or is too little.
    """
    most = tokens if held else tokens + validation_tokens
    count = filler.fill("the data", corpora, most, seed)
    if held:
        own = filler.fill("the validation data", held, validation_tokens, seed)
        training, chosen = torch.arange(count), count + torch.arange(own)
    else:
        there = sum(length for length, _ in filler.lengths)
        wanted = max(1, round(validation_tokens * count / there))
        training, chosen = held_out(count, wanted, whole=there >= most)
    if not len(training):
        raise LrkvError(
            f"the data is {count} example(s): too few to train on and hold some out",
            "give more, or a smaller validation_tokens",
        )
    filler.flush()
    write_json(
        filler.folder / ABOUT,
        {
            "lengths": filler.lengths,
            "training": training.tolist(),
            "validation": chosen.tolist(),
            "sha256": filler.digest.hexdigest(),
            "written": filler.written,
        },
    )


def filled(folder: Path) -> Pairs | None:
    """What `fill` wrote, or None."""
    if not (folder / ABOUT).is_file():  # written last
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return Pairs(
        torch.tensor(about["training"]),
        torch.tensor(about["validation"]),
        about["sha256"],
        folder,
        torch.tensor(about["lengths"]),
        about["written"],
    )
