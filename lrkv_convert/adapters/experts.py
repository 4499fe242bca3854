"""Mixture-of-experts checkpoints keep every expert's matrices apart; transformers' models hold them stacked."""
import re
from dataclasses import dataclass

import torch

EXPERT = re.compile(r"(?P<layer>.*\.)(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


@dataclass(frozen=True)
class Stacked:
    """Matrices of all experts as one tensor (experts, out, in), read when it is asked for. parts: per expert, those to stand one above the other."""

    parts: tuple[tuple, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (len(self.parts), sum(p.shape[0] for p in first), first[0].shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][0].dtype

    def read(self) -> torch.Tensor:
        return torch.stack([torch.cat([p if isinstance(p, torch.Tensor) else p.read() for p in expert]) for expert in self.parts])


def stacked(tensors: dict) -> dict:
    """Mixtral's and Qwen's names and shapes -> those of transformers' modules (`mlp.experts.gate_up_proj` and `down_proj`). What is stacked stays."""
    kept, layers = {}, {}
    for name, held in tensors.items():
        if match := EXPERT.fullmatch(name):
            layers.setdefault(match["layer"], {}).setdefault(int(match["expert"]), {})[PARTS[match["part"]]] = held
        else:
            kept[name.replace(".block_sparse_moe.", ".mlp.")] = held
    for layer, experts in layers.items():
        whole = [experts[e] for e in sorted(experts) if len(experts[e]) == 3]
        if len(whole) == len(experts):      # otherwise a shard is missing, which the check of names will say
            kept[f"{layer}mlp.experts.gate_up_proj"] = Stacked(tuple((e["gate"], e["up"]) for e in whole))
            kept[f"{layer}mlp.experts.down_proj"] = Stacked(tuple((e["down"],) for e in whole))
    return kept
