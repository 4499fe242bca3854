"""What training reads: examples on disk, of which some are held out.

What a step reads is a function of the step alone, which is why a run can be resumed, and sharded
over any number of processes, without changing what it learns from.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..examples.example import Example


@dataclass(frozen=True)
class Data(ABC):
    """training, validation: indices of examples; sha256: of all that is read, in its order; noun:
    what examples are called.
    """

    training: Tensor
    validation: Tensor
    sha256: str

    noun: ClassVar[str] = "examples"

    @abstractmethod
    def examples(self, indices: Tensor) -> list[Example]:
        """Those examples, as tensors."""

    @abstractmethod
    def tokens_of(self, indices: Tensor) -> int:
        """Tokens that the decoder reads in these examples."""

    @abstractmethod
    def predicted_of(self, indices: Tensor) -> int:
        """Positions of theirs whose prediction counts."""

    def record(self) -> dict:
        """What the history in lrkv.json says of it."""
        return {"windows_sha256": self.sha256}

    @property
    def tokens_per_example(self) -> float:
        """In mean, of those trained on."""
        return self.tokens_of(self.training) / len(self.training)

    def rounds(self, tokens: int) -> float:
        """How often the data is read to train on this many tokens."""
        return tokens / self.tokens_of(self.training)

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Indices of the examples of a step (0, 1, ...): a new seeded order each time all were
        read.
        """
        count, first = len(self.training), step * size
        orders = {
            epoch: torch.randperm(
                count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            )
            for epoch in range(first // count, (first + size - 1) // count + 1)
        }
        return torch.stack(
            [self.training[orders[k // count][k % count]] for k in range(first, first + size)]
        )


def held_out(count: int, held: int, whole: bool) -> tuple[Tensor, Tensor]:
    """Indices of `count` examples: those trained on and, evenly between them, those held out; of
    data that ran out (not `whole`) a tenth at most.
    """
    held = held if whole else min(held, max(1, count // 10))
    chosen = torch.linspace(0, count - 1, held + 2)[1:-1].round().long()
    training = sorted(set(range(count)) - set(chosen.tolist()))
    return torch.tensor(training, dtype=torch.long), chosen
