"""What a model reads at once, and which of its predictions count: the unit of calibration, training
and measurement, whatever the model reads.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a position whose prediction does not count, as torch's cross_entropy has it


@dataclass(frozen=True)
class Example:
    """inputs: arguments of the model, a batch of one each: {"input_ids": (1, T)} of a decoder;
    {"input_ids": (1, S) or "input_features": (1, channels, frames), "decoder_input_ids": (1, T)} of
    an encoder-decoder. predicts (T,): the token that follows each position of the decoder, IGNORED
    where it does not count.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor

    @property
    def ids(self) -> Tensor:
        """What the decoder reads, (1, T)."""
        name = "decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"
        return self.inputs[name]

    @property
    def source(self) -> dict[str, Tensor]:
        """What the encoder reads; {} for a decoder on its own."""
        if "decoder_input_ids" not in self.inputs:
            return {}
        return {name: t for name, t in self.inputs.items() if name != "decoder_input_ids"}

    @property
    def tokens(self) -> int:
        """That the decoder reads, T."""
        return len(self.predicts)

    def to(self, device: torch.device) -> "Example":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Example(inputs, self.predicts.to(device))


def window(ids: Tensor) -> Example:
    """A window of text (T,): every token but the first is predicted."""
    return Example({"input_ids": ids.unsqueeze(0)}, torch.cat((ids[1:], ids.new_tensor([IGNORED]))))


def windows_of(rows: Tensor) -> list[Example]:
    """Windows of text (n, T)."""
    return [window(row) for row in rows]


def reads(source: Tensor) -> dict[str, Tensor]:
    """What an encoder reads as an argument of the model: ids (1, S) of a text, features
    (1, channels, frames) of speech.
    """
    return {"input_features" if source.is_floating_point() else "input_ids": source}


def pair(source: Tensor, sequence: Tensor, given: int) -> Example:
    """What an encoder reads, and what its decoder writes after it, (T + 1,): the decoder reads all
    but the last token and predicts all but the first `given`.
    """
    predicts = sequence[1:].clone()
    predicts[: given - 1] = IGNORED
    return Example({**reads(source), "decoder_input_ids": sequence[:-1].unsqueeze(0)}, predicts)


def tokens_of(examples: Iterable[Example]) -> int:
    """That the decoder reads in all."""
    return sum(example.tokens for example in examples)


def digest(examples: Sequence[Example] | None) -> str | None:
    """sha256 of what is read and written; None of nothing."""
    if examples is None:
        return None
    found = hashlib.sha256()
    for example in examples:
        for tensor in (*example.inputs.values(), example.predicts):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
