"""What healing minimises: the divergence of the student's predictions from the teacher's, or from
the next token (divergence.py), and beside it the mismatch of the attention outputs, site by site,
if asked for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batch import Batch
from .divergence import divergence


@dataclass
class Objective:
    """student: as accelerate prepared it; teacher: frozen, or None; paths: of the attention modules
    whose outputs are matched; kl_weight: 1 for kl, 0 for ce; match_attention: weight of the
    mismatch.
    """

    accelerator: Accelerator
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    paths: list[str]
    kl_weight: float
    match_attention: float

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is minimised, and its parts: KL, cross-entropy, mismatch of the attention outputs;
        means over what is predicted in the batch.
        """
        matching = bool(self.match_attention)
        theirs, logits = [], None
        if self.teacher is not None and (self.kl_weight or matching):
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                self.watched(self.teacher) as theirs,
            ):
                logits = self.teacher(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        with self.watched(self.accelerator.unwrap_model(self.student)) as ours:
            # (N T, V)
            predicted = self.student(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        loss, kl, ce = divergence(
            predicted, logits if self.kl_weight else None, batch.predicts.flatten(), self.kl_weight
        )
        match = (
            mismatch(ours, theirs, batch.read)
            if matching
            else torch.zeros((), device=predicted.device)
        )
        return loss + self.match_attention * match, kl, ce, match

    def watched(self, model: PreTrainedModel):
        paths = self.paths if self.match_attention else []
        return attention_outputs(model.get_submodule(path) for path in paths)


@contextmanager
def attention_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the outputs of attention modules, [(N, T, D) each], while the block runs."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def mismatch(student: list[Tensor], teacher: list[Tensor], read: Tensor | None = None) -> Tensor:
    """Mean over modules of |o_student - o_teacher|^2 / |o_teacher|^2, of attention outputs [(N, T,
    D) each]. read (N, T): which positions hold a token (None: all).
    """
    errors: list[Tensor] = []
    for s, t in zip(student, teacher, strict=True):
        if read is not None:
            s, t = s[read], t[read]  # (n, D)
        errors.append((s.float() - t.float()).square().sum() / t.float().square().sum())
    return sum(errors[1:], errors[0]) / len(errors)
