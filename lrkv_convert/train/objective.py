"""What healing minimises, per predicted token, in nats:

    kl    KL(teacher || student) of the next-token distributions       (Hinton et al., "Distilling
          the Knowledge in a Neural Network", arXiv 1503.02531)
    ce    cross-entropy of the next token
    and beside them the attention outputs of the teacher, layer by layer, if asked for.

Logits are the largest tensors of a step. `divergence` computes the loss and its gradient in one go,
a few rows at a time, so that beside the logits no more than the gradient is kept; plain torch
(`kl_div` of two `log_softmax`) keeps several such arrays and takes twice as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROWS = 1 << 22  # logits taken to float32 at once


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        kl_weight: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, vocabulary = student.shape
        kl = torch.zeros((), dtype=torch.float64, device=student.device)
        ce = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if with_gradient else None
        step = max(1, ROWS // vocabulary)
        for rows in (slice(i, i + step) for i in range(0, n, step)):
            log_student = student[rows].float().log_softmax(-1)  # (n', V)
            hit = targets[rows].unsqueeze(1)  # (n', 1)
            ce -= log_student.gather(1, hit).double().sum()
            if teacher is not None:
                log_teacher = teacher[rows].float().log_softmax(-1)
                p_teacher = log_teacher.exp()
                kl += torch.linalg.vecdot(p_teacher, log_teacher - log_student).double().sum()
            # of kl_weight KL + (1 - kl_weight) CE: softmax(student) - kl_weight p - (1 - kl_weight)
            # onehot
            if with_gradient:
                slope = log_student.exp_()
                if kl_weight:
                    slope.sub_(p_teacher, alpha=kl_weight)
                if kl_weight < 1:
                    slope.scatter_add_(
                        1, hit, torch.full_like(hit, kl_weight - 1, dtype=slope.dtype)
                    )
                gradient[rows] = slope.div_(n)
        ctx.save_for_backward(gradient)
        kl, ce = (kl / n).float(), (ce / n).float()
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        # in place: it is read once
        return ctx.saved_tensors[0].mul_(grad), None, None, None, None


def divergence(
    student: Tensor, teacher: Tensor | None, targets: Tensor, kl_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_weight KL(teacher || student) + (1 - kl_weight) CE, KL, CE), means over tokens; the first
    carries the gradient to the student.

    student, teacher: logits (n, V); targets: token ids (n,). Without a teacher kl_weight is 0 and
    KL reads 0.
    """
    assert teacher is not None or kl_weight == 0
    return _Divergence.apply(student, teacher, targets, kl_weight, student.requires_grad)


class AttentionOutputs:
    """The outputs of every layer's attention module during a forward pass."""

    def __init__(self, layers: nn.ModuleList, attention: str):
        """layers: the decoder layers; attention: the attention module's name in each."""
        self.modules = [layer.get_submodule(attention) for layer in layers]

    @contextmanager
    def __call__(self) -> Iterator[list[Tensor]]:
        """Collects [(N, T, D) per layer] while the block runs."""
        outputs: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
            for module in self.modules
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


def mismatch(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of |o_student - o_teacher|^2 / |o_teacher|^2, of attention outputs [(N, T,
    D) per layer].
    """
    errors = [
        (s.float() - t.float()).square().sum() / t.float().square().sum()
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(errors) / len(errors)
