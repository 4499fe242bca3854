"""Mixture-of-experts checkpoints keep every expert's matrices apart; transformers' models hold them
stacked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import LrkvError

EXPERT = re.compile(
    r"(?P<layer>.*\.)(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight"
)
PARTS = {
    "w1": "gate",
    "gate_proj": "gate",
    "w3": "up",
    "up_proj": "up",
    "w2": "down",
    "down_proj": "down",
}


@dataclass(frozen=True)
class Stacked:
    """Matrices of all experts as one tensor (experts, out, in), read when it is asked for. parts:
    per expert, those to stand one above the other.
    """

    parts: tuple[tuple, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        for expert in self.parts:
            for part, wanted in zip(expert, first):
                if tuple(part.shape) != tuple(wanted.shape) or len(wanted.shape) != 2:
                    # which no model asks for: the check of shapes says so
                    return tuple(part.shape)
        return (len(self.parts), sum(p.shape[0] for p in first), first[0].shape[1])

    @property
    def dtype(self) -> torch.dtype | str:
        """The widest of all parts; that of one which is no weight (float8, integers) before, for
        the check of types to refuse.
        """
        kinds = {part.dtype for expert in self.parts for part in expert}
        strange = [
            kind
            for kind in kinds
            if not (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1)
        ]
        return min(strange, key=str) if strange else max(kinds, key=lambda kind: kind.itemsize)

    def read(self) -> torch.Tensor:
        return torch.stack(
            [
                torch.cat([p if isinstance(p, torch.Tensor) else p.read() for p in expert])
                for expert in self.parts
            ]
        )


def stacked(tensors: dict) -> dict:
    """Mixtral's and Qwen's names and shapes -> those of transformers' modules
    (`mlp.experts.gate_up_proj` and `down_proj`). What is stacked stays.
    """
    kept, layers = [], {}
    for name, held in tensors.items():
        if match := EXPERT.fullmatch(name):
            layers.setdefault(match["layer"], {}).setdefault(int(match["expert"]), {})[
                PARTS[match["part"]]
            ] = held
        else:
            kept.append((name.replace(".block_sparse_moe.", ".mlp."), held))
    for layer, experts in layers.items():
        whole = [experts[e] for e in sorted(experts) if len(experts[e]) == 3]
        # otherwise a shard is missing, which the check of names will say
        if len(whole) == len(experts):
            kept.append(
                (
                    f"{layer}mlp.experts.gate_up_proj",
                    Stacked(tuple((e["gate"], e["up"]) for e in whole)),
                )
            )
            kept.append(
                (f"{layer}mlp.experts.down_proj", Stacked(tuple((e["down"],) for e in whole)))
            )
    return once(kept)


def once(tensors: Iterable[tuple[str, object]]) -> dict:
    """Tensors by the names they have today. Raises LrkvError where one stands under its old and its
    new name: which of them transformers reads is chance.
    """
    found = {}
    for name, held in tensors:
        if name in found:
            raise LrkvError(
                f"the checkpoint holds {name} twice, under its old name and its new",
                "remove the one that is not meant",
            )
        found[name] = held
    return found
