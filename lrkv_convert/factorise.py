"""Fit the factors of one side (keys or values) of one layer.

    W_h ~ W_shared C_h + U_h B_h^T        minimising  sum_h || S (W_h - What_h) M_h ||_F^2,   S = Sigma^(1/2), M_h = M_h^(1/2)

    joint     base and residuals fitted together (Joint and Individual Variation Explained, Lock et al. 2013): alternate the leading left
              singular vectors of [A_1 - L_1 ... A_H - L_H] with rank-r truncations L_h of (I - Q Q^T) A_h, where A_h = S W_h M_h
    aligned   the paper's own form, C_h = I, after a gauge that the partner (W_Q or W_O) absorbs. Values and keys without RoPE: any invertible
              map. Keys under RoPE: one complex number per frequency pair, all that commutes with the rotation (PAPER section 4)
    mean      W_shared = the plain mean of W_h. Here to be compared with: it destroys pretrained models
    pooled    heads replaced by the means of groups of heads: multi-query and grouped-query attention, as "uptraining" starts. No residual
    grouped   one latent per group of heads, no residual: Palu's G-LRD. (m = 0 of joint is its M-LRD, r = 0 its J-LRD, the latent of MLA)

Everything is float64. Shapes: H heads, D width, d head width, m base width, r rank.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import Metric, rotation_average, square_root

SWEEPS = 12
GROUP_SIZE = 4
GAUGE_FLOOR = 1e-3      # singular values of a gauge, relative to the largest: its inverse multiplies B, which must survive bf16


@dataclass(frozen=True)
class Factors:
    """One side of one layer, float64.

    W_shared (D, m), C (H, m, d) or None for C = I, U (H, D, r), B (H, d, r); gauge (H, d, d) or None: the true head is What_h gauge_h, and
    the partner is to absorb gauge_h; error: relative, in the fitted metric; history: the same after each sweep.
    """

    W_shared: Tensor
    C: Tensor | None
    U: Tensor
    B: Tensor
    gauge: Tensor | None
    error: float
    history: tuple[float, ...] = ()

    def heads(self) -> Tensor:
        """The matrices the factors stand for, in the original gauge, (H, D, d)."""
        W = (self.W_shared if self.C is None else self.W_shared @ self.C) if self.W_shared.shape[1] else 0
        W = W + self.U @ self.B.mT                                                          # (H, D, d)
        return W if self.gauge is None else W @ self.gauge


def joint(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = SWEEPS) -> Factors:
    """Joint fit of W (H, D, d)."""
    A = metric.S.root @ W @ metric.M.root                                                   # (H, D, d)
    Q, V, history = _alternate(A, m, r, sweeps)                                             # (D, m), (H, d, r)
    W_shared, QA = metric.S.inverse @ Q, Q.T @ A                                            # (D, m), (H, m, d)
    C = Q.T @ (metric.S.root @ W) if m else None                                            # (H, m, d)
    # U_h B_h^T = S^-1 (A_h - Q Q^T A_h) V V^T M_h^-1, and S^-1 A_h is W_h M_h exactly: only the base goes through S^-1
    return _finish(W, metric, W_shared, C, W @ metric.M.root @ V - W_shared @ (QA @ V), metric.M.inverse @ V, None, A.square().sum(), history)


def error_curve(W: Tensor, metric: Metric, shapes: list[tuple[int, int]], sweeps: int = 4) -> list[float]:
    """Squared error of the joint fit, absolute, for each (m, r). Without residuals it is the discarded singular values of all heads."""
    A = metric.S.root @ W @ metric.M.root
    tail = torch.linalg.svdvals(_reduced(A)[1].transpose(0, 1).flatten(1)).square().flip(0).cumsum(0).flip(0)   # tail[m]: all beyond the first m
    total = tail[0].item()
    return [(tail[m].item() if m < len(tail) else 0.0) if r == 0 else _alternate(A, m, r, sweeps)[2][-1] ** 2 * total for m, r in shapes]


def _reduced(A: Tensor) -> tuple[Tensor | None, Tensor]:
    """A (H, D, d) = basis (D, n) times (H, n, d) with n = H d, if that is smaller than D; else (None, A)."""
    H, D, d = A.shape
    if D <= H * d:
        return None, A
    basis, R = torch.linalg.qr(A.transpose(0, 1).reshape(D, H * d))
    return basis, R.view(H * d, H, d).transpose(0, 1)


def _alternate(A: Tensor, m: int, r: int, sweeps: int) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Q (D, m) and V (H, d, r) minimising sum_h || (I - Q Q^T) A_h (I - V_h V_h^T) ||^2 by alternation, and the relative error per sweep."""
    basis, A = _reduced(A)
    H, n, d = A.shape
    total = A.square().sum().clamp_min(torch.finfo(A.dtype).tiny)
    L, history = torch.zeros_like(A), []
    for _ in range(sweeps if m and r else 1):
        Q = _leading_left((A - L).transpose(0, 1).reshape(n, H * d), m)                     # (n, m)
        rest = A - Q @ (Q.T @ A)                                                            # (H, n, d)
        V = _leading_right(rest, r)                                                         # (H, d, r)
        L = (rest @ V) @ V.mT                                                               # (H, n, d)
        history.append(((rest - L).square().sum() / total).sqrt().item())
        if len(history) > 1 and history[-2] - history[-1] < 1e-5 * history[-2]:
            break
    return (Q if basis is None else basis @ Q), V, tuple(history)


def aligned(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = SWEEPS) -> Factors:
    """C = I after a gauge. `rotary` restricts the gauge to maps that commute with RoPE."""
    check_shape("aligned", W.shape[0], W.shape[2], m, r)
    if rotary:
        W_shared, gauge = _rotary_base(W, metric, r, sweeps)
    else:
        fit = joint(W, metric, m, r, sweeps=sweeps)
        W_shared, gauge = fit.W_shared, fit.C
    left, sizes, right = torch.linalg.svd(gauge)                                            # (H, d, d), (H, d), (H, d, d)
    top = sizes[:, :1]
    sizes = torch.where(top > 0, torch.maximum(sizes, GAUGE_FLOOR * top), torch.ones_like(sizes))   # a dead head keeps a gauge that inverts
    gauge = left * sizes.unsqueeze(-2) @ right
    return _residual_after(W, metric, W_shared, gauge, r, inverse=right.mT / sizes.unsqueeze(-2) @ left.mT)


def mean(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0) -> Factors:
    """The plain mean as base, C = I, residuals truncated in the metric."""
    check_shape("mean", W.shape[0], W.shape[2], m, r)
    return _residual_after(W, metric, W.mean(0), None, r)


def pooled(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0) -> Factors:
    """Mean-pooled heads: m / d groups of heads share their mean; one group is multi-query, several are grouped-query attention."""
    H, D, d = W.shape
    check_shape("pooled", H, d, m, r)
    groups = _groups(H, m // d)
    C = W.new_zeros(H, m, d)
    for g, members in enumerate(groups):
        C[members, g * d:(g + 1) * d] = torch.eye(d, dtype=W.dtype, device=W.device)
    return _finish(W, metric, torch.cat([W[members].mean(0) for members in groups], dim=1), C, W.new_zeros(H, D, 0), W.new_zeros(H, d, 0), None)


def grouped(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0) -> Factors:
    """One latent per group of about four heads, at least two groups (Palu's G-LRD), each m / groups wide."""
    H, D, d = W.shape
    check_shape("grouped", H, d, m, r)
    groups = _groups(H, group_count(H))
    A, rho = metric.S.root @ W @ metric.M.root, m // len(groups)
    C, shared = W.new_zeros(H, m, d), []
    for g, members in enumerate(groups):
        Q = _leading_left(A[members].transpose(0, 1).reshape(D, -1), rho)                   # (D, rho)
        C[members, g * rho:(g + 1) * rho] = Q.T @ metric.S.root @ W[members]
        shared.append(metric.S.inverse @ Q)
    return _finish(W, metric, torch.cat(shared, dim=1), C, W.new_zeros(H, D, 0), W.new_zeros(H, d, 0), None)


def _groups(H: int, count: int) -> list[list[int]]:
    """Heads 0 to H - 1 in `count` runs of nearly equal length."""
    return [part.tolist() for part in torch.arange(H).tensor_split(count)]


def check_shape(base: str, H: int, d: int, m: int, r: int) -> None:
    """Raise ValueError for a base width and rank that a base cannot have."""
    if base in UNALIGNED and m != d:
        raise ValueError(f"the {base} base is as wide as a head ({d}), got {m}")
    if base == "pooled" and (m % d or not 0 < m <= H * d or r):
        raise ValueError(f"pooled heads need a base of 1 to {H} times {d} and rank 0, got {m} and {r}")
    if base == "grouped" and (m % group_count(H) or r):
        raise ValueError(f"grouped latents need a base width divisible by {group_count(H)} and rank 0, got {m} and {r}")


def group_count(H: int) -> int:
    """How many groups `grouped` makes of H heads."""
    return max(2, H // GROUP_SIZE)


BASES: dict[str, Callable[..., Factors]] = {"joint": joint, "aligned": aligned, "mean": mean, "pooled": pooled, "grouped": grouped}
UNALIGNED = ("aligned", "mean")     # bases with C = I


def _leading_left(A: Tensor, m: int) -> Tensor:
    """Leading m left singular vectors of A (D, n), through its Gram matrix; columns beyond the rank of A are zero."""
    D, n = A.shape
    if D <= n:
        vectors = torch.linalg.eigh(A @ A.T).eigenvectors.flip(1)[:, :m]
    else:
        vectors = torch.linalg.qr(A @ torch.linalg.eigh(A.T @ A).eigenvectors.flip(1)[:, :m]).Q
    return torch.cat((vectors, vectors.new_zeros(D, m - vectors.shape[1])), dim=1)


def _leading_right(A: Tensor, r: int) -> Tensor:
    """Leading r right singular vectors of each A_h (H, D, d) -> (H, d, r)."""
    return torch.linalg.eigh(A.mT @ A).eigenvectors[..., A.shape[-1] - r:].flip(-1)


def _residual_after(W: Tensor, metric: Metric, W_shared: Tensor, gauge: Tensor | None, r: int, inverse: Tensor | None = None) -> Factors:
    """Given base and gauge, the best residual: truncated SVD of S (W_h - W_shared gauge_h) M_h, then taken into the gauge."""
    base = W_shared if gauge is None else W_shared @ gauge                                  # (D, d) or (H, D, d)
    rest = (W - base) @ metric.M.root                                                       # (H, D, d), without S
    V = _leading_right(metric.S.root @ rest, r)                                             # (H, d, r)
    U, B_T = rest @ V, V.mT @ metric.M.inverse                                              # (H, D, r), (H, r, d)
    if inverse is not None:
        B_T = B_T @ inverse
    return _finish(W, metric, W_shared, None, U, B_T.mT, gauge)


def _rotary_base(W: Tensor, metric: Metric, r: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Base and gauge for RoPE keys. Per frequency pair, the heads' complex columns are approximated by one column times a number per head:
    a rank-1 SVD, alternated with the residuals, in the rotation average of the metric. Returns W_shared (D, d) and the gauge (H, d, d)."""
    H, D, d = W.shape
    metric = Metric(metric.S, square_root(rotation_average(metric.M.root @ metric.M.root)))
    A = metric.S.root @ W @ metric.M.root                                                   # (H, D, d); M is diagonal, equal in a pair
    scale = metric.M.root.diagonal(dim1=-2, dim2=-1)[:, : d // 2]                           # (H, d/2)
    L = torch.zeros_like(A)
    for _ in range(max(sweeps, 1)):
        columns = _complex(A - L).permute(2, 1, 0)                                          # (d/2, D, H)
        vectors = torch.linalg.eigh(columns.mH @ columns).eigenvectors[..., -1:]            # (d/2, H, 1)
        shared = columns @ vectors                                                          # (d/2, D, 1)
        base = _real((shared @ vectors.mH).permute(2, 1, 0))                                # (H, D, d)
        rest = A - base
        V = _leading_right(rest, r)
        L = rest @ V @ V.mT
    coefficients = vectors.squeeze(-1).conj().T / scale                                     # (H, d/2)
    return metric.S.inverse @ _real(shared.squeeze(-1).T.unsqueeze(0))[0], _pair_maps(coefficients)


def _complex(A: Tensor) -> Tensor:
    """(..., d) in half-split RoPE layout -> (..., d/2) complex: rotating by an angle is multiplying by exp(i angle)."""
    left, right = A.chunk(2, dim=-1)
    return torch.complex(left.contiguous(), right.contiguous())


def _real(Z: Tensor) -> Tensor:
    return torch.cat((Z.real, Z.imag), dim=-1)


def _pair_maps(c: Tensor) -> Tensor:
    """Complex numbers per head and pair (H, d/2) as maps (H, d, d) acting on row vectors."""
    a, b = torch.diag_embed(c.real), torch.diag_embed(c.imag)
    return torch.cat((torch.cat((a, b), -1), torch.cat((-b, a), -1)), -2)


def _finish(W, metric, W_shared, C, U, B, gauge, total=None, history=()) -> Factors:
    """The factors with their error, measured on what they stand for."""
    heads = Factors(W_shared, C, U, B, gauge, 0.0).heads()
    error = (metric.S.root @ (W - heads) @ metric.M.root).square().sum()
    total = (metric.S.root @ W @ metric.M.root).square().sum() if total is None else total
    return Factors(W_shared, C, U, B, gauge, (error / total).sqrt().item() if total > 0 else 0.0, history)
