"""How far the student's next-token distributions are from the teacher's, and from the next token,
per predicted token, in nats:

    kl    KL(teacher || student)    (Hinton et al., "Distilling the Knowledge in a Neural Network",
                                    arXiv 1503.02531)
    ce    cross-entropy of the next token

Logits are the largest tensors of a step. `divergence` computes the loss and its gradient in one go,
a few rows at a time, so that beside the logits no more than the gradient is kept; plain torch
(`kl_div` of two `log_softmax`) keeps several such arrays and takes twice as long.
"""

import math

import torch
from torch import Tensor

from ..examples.example import IGNORED

AT_ONCE = 1 << 22  # logits taken to float32 at once


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        kl_weight: float,
        with_gradient: bool,
        at_once: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocabulary = student.shape
        counts = (targets != IGNORED).unsqueeze(1)  # (n, 1)
        n = counts.sum()
        # by what a row's gradient is divided: nothing is left of those that do not count
        share = torch.where(counts, n.float(), math.inf)  # (n, 1)
        hits = targets.clamp(min=0).unsqueeze(1)  # (n, 1)
        kl = torch.zeros((), dtype=torch.float64, device=student.device)
        ce = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if with_gradient else None
        step = max(1, at_once // vocabulary)
        for at in (slice(i, i + step) for i in range(0, rows, step)):
            log_student = student[at].float().log_softmax(-1)  # (n', V)
            ce -= (log_student.gather(1, hits[at]).double() * counts[at]).sum()
            p_teacher = None
            if teacher is not None:
                log_teacher = teacher[at].float().log_softmax(-1)
                p_teacher = log_teacher.exp()
                apart = torch.linalg.vecdot(p_teacher, log_teacher - log_student)  # (n',)
                kl += (apart.double() * counts[at, 0]).sum()
            if gradient is not None:
                slope = _slope(log_student, p_teacher, hits[at], kl_weight)
                gradient[at] = slope.div_(share[at])
        ctx.save_for_backward(gradient)
        kl, ce = (kl / n).float(), (ce / n).float()
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        # in place: it is read once
        return ctx.saved_tensors[0].mul_(grad), None, None, None, None, None


def _slope(log_student: Tensor, p_teacher: Tensor | None, hits: Tensor, kl_weight: float) -> Tensor:
    """The gradient of kl_weight KL + (1 - kl_weight) CE to the logits (n', V), in place:
    softmax(student) - kl_weight p_teacher - (1 - kl_weight) onehot. hits (n', 1): the next tokens.
    """
    slope = log_student.exp_()
    if kl_weight and p_teacher is not None:
        slope.sub_(p_teacher, alpha=kl_weight)
    if kl_weight < 1:
        slope.scatter_add_(1, hits, torch.full_like(hits, kl_weight - 1, dtype=slope.dtype))
    return slope


def divergence(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    kl_weight: float,
    at_once: int = AT_ONCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_weight KL(teacher || student) + (1 - kl_weight) CE, KL, CE), means over the tokens that
    count; the first carries the gradient to the student.

    student, teacher: logits (n, V); targets: token ids (n,), IGNORED where a row does not count.
    Without a teacher kl_weight is 0 and KL reads 0. at_once: logits taken to float32 at once, in
    whole rows.
    """
    assert teacher is not None or kl_weight == 0
    return _Divergence.apply(student, teacher, targets, kl_weight, student.requires_grad, at_once)
