"""The joint fit where every head has a Sigma of its own.

    minimise  sum_h || Sigma_h^(1/2) (W_h - W_shared C_h - U_h B_h^T) M_h ||_F^2

M_h stands for M_h^(1/2) here.

Heads attend to different tokens, so what they average differs. No Sigma_h is ever formed (H D^2
numbers): W_shared and U_h are sought in the span of all heads, W_shared = Q y with orthonormal Q
(D, k), k <= H d (`metrics.head_basis`), where the matrices Q^T Sigma_h Q say everything. Alternate

    C_h and V_h, given y       closed form: least squares, then the leading right singular vectors
                               of what is left;  U_h B_h^T M_h = rest_h V_h V_h^T
    y, given C_h and V_h       sum_h Sigma_h y (C_h N_h C_h^T) = sum_h Sigma_h Q^T W_h M_h N_h C_h^T
                               with N_h = I - V_h V_h^T,  by conjugate gradients

Neither step can raise the error, and the second is prolonged. Starts from the fit with one Sigma
for all heads (fit/bases.py). float64, of sums in float32.
"""

from typing import cast

import torch
from torch import Tensor

from .metric import inverse_root, runs

# alternations at most, and conjugate gradients in each; 12 and 10 leave errors of values up to 5 %
# larger in the same time
SWEEPS, STEPS = 24, 2
# of those steps, where residuals take part: below 2 the error cannot rise, and V_h follows sooner
RELAXATION = 1.9
STOP = 1e-3  # relative fall of the squared error below which the alternation ends


def refine(
    grams: Tensor, own: Tensor, y: Tensor, r: int, sweeps: int = SWEEPS, stop: float = STOP
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, ...]]:
    """(y (k, m), C_h M_h (H, m, d), rest_h V_h (H, k, r), V (H, d, r), relative error per sweep).

    grams (runs, k, k): Q^T Sigma_h Q, for runs of heads that share one; own (H, k, d): Q^T W_h M_h;
    y (k, m): where to start; sweeps: alternations at most; stop: the relative fall of the squared
    error below which they end.
    """
    H, _, d = own.shape
    members = runs(H, len(grams))
    sizes_of = (
        (part * (G @ part)).sum() for G, heads in zip(grams, members) for part in own[heads]
    )
    total = cast(Tensor, sum(sizes_of)).clamp_min(torch.finfo(own.dtype).tiny)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    inverse, history = None, []
    while True:
        # the scale is free
        y = y @ inverse_root(y.T @ (grams.mean(0) @ y))
        C, rest, sizes, V = (
            torch.cat(part)
            for part in zip(*(_given_base(G, own[heads], y) for G, heads in zip(grams, members)))
        )
        # (H, d, r)
        V = V[..., d - r :].flip(-1)
        error = (sizes[:, : d - r].clamp_min(0).sum() / total).sqrt().item()
        if best is not None and error > history[-1]:
            return *best, tuple(history)  # rounding has the last word
        history.append(error)
        best = y, C, rest @ V, V
        if (
            not y.shape[1]
            or r == d
            or len(history) == sweeps
            or len(history) > 1
            and history[-2] ** 2 - history[-1] ** 2 < stop * history[-2] ** 2
        ):
            return *best, tuple(history)
        inverse = _pseudo_inverse(grams.sum(0)) if inverse is None else inverse
        better = _given_residuals(grams, members, own, C, V, y, inverse)
        y = y + (RELAXATION if r else 1.0) * (better - y)


def _given_base(G: Tensor, own: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a run of heads: C M (h, m, d), what is left of their columns (h, k, d), and eigenvalues
    (h, d) and vectors (h, d, d) of that in the metric, ascending.
    """
    seen = G @ y  # (k, m)
    C = _pseudo_inverse(y.T @ seen) @ (seen.T @ own)
    rest = own - y @ C
    return C, rest, *torch.linalg.eigh(rest.mT @ (G @ rest))


def _given_residuals(
    grams: Tensor,
    members: list[slice],
    own: Tensor,
    C: Tensor,
    V: Tensor,
    y: Tensor,
    inverse: Tensor,
) -> Tensor:
    """A better y (k, m): conjugate gradients, preconditioned by the mean of either side."""
    # (H, m, d): C_h N_h
    beyond = C - C @ V @ V.mT
    # (runs, m, m)
    left = torch.stack([(beyond[heads] @ C[heads].mT).sum(0) for heads in members])
    apply = lambda x: sum(G @ (x @ part) for G, part in zip(grams, left))
    # (k, m)
    wanted = sum(G @ (own[heads] @ beyond[heads].mT).sum(0) for G, heads in zip(grams, members))
    right = _pseudo_inverse(left.sum(0))
    residual = wanted - apply(y)
    step = direction = inverse @ residual @ right
    size = first = (residual * step).sum()
    for _ in range(STEPS):
        if size <= torch.finfo(y.dtype).eps * first or size <= 0:
            break
        along = apply(direction)
        length = size / (direction * along).sum()
        y, residual = y + length * direction, residual - length * along
        step = inverse @ residual @ right
        before, size = size, (residual * step).sum()
        direction = step + size / before * direction
    return y


def _pseudo_inverse(G: Tensor) -> Tensor:
    """Of a positive matrix (n, n)."""
    if not len(G):
        return G
    root = inverse_root(G)
    return root @ root.T
