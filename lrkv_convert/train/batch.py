"""Examples as one pass of a model takes them: of different lengths, padded on the right.

Decoders attend backwards only, so what is padded after a decoder's tokens changes none of them and
needs no mask; what an encoder reads does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..examples.example import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """inputs: arguments of the model, (N, ...) each; predicts (N, T): as in `Example`; read (N, T):
    whether a position holds a token, None where all do.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    read: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            self.predicts.to(device),
            None if self.read is None else self.read.to(device),
        )


def together(examples: list[Example]) -> Batch:
    """Several examples as one batch."""
    inputs = {name: _padded([e.inputs[name][0] for e in examples]) for name in examples[0].inputs}
    lengths = [next(iter(e.source.values())).shape[-1] for e in examples if e.source]
    if "decoder_input_ids" in inputs and len(set(lengths)) > 1:
        inputs["attention_mask"] = _padded([torch.ones(n, dtype=torch.long) for n in lengths])
    read = [torch.ones(e.tokens, dtype=torch.bool) for e in examples]
    alike = len({e.tokens for e in examples}) == 1
    predicts = _padded([e.predicts for e in examples], IGNORED)
    return Batch(inputs, predicts, None if alike else _padded(read))


def _padded(rows: list[Tensor], value: int = 0) -> Tensor:
    """(n, ...) each -> (N, the longest n, ...)."""
    return pad_sequence(rows, batch_first=True, padding_value=value)
