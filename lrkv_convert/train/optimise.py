"""By which optimiser each parameter trains.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) orthogonalises the update of a
matrix, which is meant for hidden matrices; with `match_rms_adamw` (Liu et al., "Muon is Scalable
for LLM Training", arXiv 2502.16982) its update has the size of one of AdamW's. Embeddings, the
head, norms and biases go to AdamW, as in both. So do the per-head factors U, C and B: whether Muon
orthogonalises them head by head, or all heads as one matrix, or AdamW takes them, the healed
perplexity was the same (x1.0228, x1.0220, x1.0220; benchmarks/NOTES.md), and torch's Muon refuses
what is no matrix.
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..modeling.factors_lrkv import LowRankHeads
from .options import Options


def groups(model: PreTrainedModel, optimizer: str) -> dict[str, dict[str, nn.Parameter]]:
    """{"muon": {name: parameter}, "adamw": {...}}: every parameter that trains, in exactly one of
    them.
    """
    apart = {
        id(p)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for p in module.parameters()
    }
    apart |= {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    apart |= {
        id(p)
        for module in model.modules()
        if isinstance(module, LowRankHeads)
        for p in of_heads(module)
    }
    found = {"muon": {}, "adamw": {}}
    for name, parameter in model.named_parameters():  # a tied one comes once
        if parameter.requires_grad:
            hidden = optimizer == "muon" and parameter.ndim == 2 and id(parameter) not in apart
            found["muon" if hidden else "adamw"][name] = parameter
    return found


def of_heads(heads: LowRankHeads) -> list[Tensor]:
    """What holds something of its own for every head: U, C, B and the biases (H, d), which are
    vectors though they look like a matrix.
    """
    return [
        p
        for p in (heads.U.weight if heads.U is not None else None, heads.C, heads.B, heads.bias)
        if p is not None
    ]


class MuonAdamW(Optimizer):
    """torch's Muon and AdamW as one optimiser, with one state and one list of groups, because what
    shards, saves and restores optimisers expects one per model.

    found: {"muon": {name: parameter}, "adamw": {...}}, either of them may be empty.
    """

    def __init__(self, found: dict[str, dict[str, nn.Parameter]], options: Options):
        self.parts = {}
        if found["muon"]:
            self.parts["muon"] = torch.optim.Muon(
                found["muon"].values(),
                lr=options.muon_lr,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                adjust_lr_fn=options.adjust_lr,
            )
        if found["adamw"]:
            self.parts["adamw"] = torch.optim.AdamW(
                found["adamw"].values(),
                lr=options.adamw_lr,
                weight_decay=options.weight_decay,
                betas=(options.beta1, options.beta2),
            )
        super().__init__(
            [
                {**group, "optimizer": name}
                for name, part in self.parts.items()
                for group in part.param_groups
            ],
            {},
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
        loss = None if closure is None else closure()
        # loading and sharding put other lists and other states in place of those there were
        for name, part in self.parts.items():
            part.param_groups, part.state = (
                [group for group in self.param_groups if group["optimizer"] == name],
                self.state,
            )
            part.step()
        return loss


def schedule(optimizer: Optimizer, options: Options, steps: int) -> LambdaLR:
    """Linear warm-up over the first `warmup` of the steps, then half a cosine down to `final_lr` of
    the highest rate.
    """
    warm = round(options.warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return (
            options.final_lr
            + (1 - options.final_lr)
            * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
            / 2
        )

    return LambdaLR(optimizer, factor)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """{"muon": rate, "adamw": rate} of the next step."""
    return {group["optimizer"]: group["lr"] for group in optimizer.param_groups}
