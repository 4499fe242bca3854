"""Fit the factors of one side (keys or values) of one layer.

    W_h ~ W_shared C_h + U_h B_h^T        minimising  sum_h || S (W_h - What_h) M_h ||_F^2,   S = Sigma^(1/2), M_h = M_h^(1/2)

    joint     base and residuals fitted together (Joint and Individual Variation Explained, Lock et al. 2013): alternate the leading left
              singular vectors of [A_1 - L_1 ... A_H - L_H] with rank-r truncations L_h of (I - Q Q^T) A_h, where A_h = S W_h M_h
    aligned   the paper's own form, C_h = I, after a gauge that the partner (W_Q or W_O) absorbs. Values and keys without RoPE: any invertible
              map. Keys under RoPE: one complex number per frequency pair, all that commutes with the rotation (PAPER section 4)
    mean      W_shared = the plain mean of W_h. Here to be compared with: it destroys pretrained models

Everything is float64. Shapes: H heads, D width, d head width, m base width, r rank.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import Metric

SWEEPS = 12
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
    """Joint fit of W (H, D, d). Works in Gram matrices: nothing larger than (H d, H d) is decomposed."""
    H, D, d = W.shape
    A = metric.S.root @ W @ metric.M.root                                                   # (H, D, d)
    total = A.square().sum()
    if m == 0:
        return _finish(W, metric, _empty_base(W), None, *_residual(W, A, A, W.new_zeros(D, 0), r, metric), None, total)
    L, history = torch.zeros_like(A), []
    for _ in range(sweeps if r else 1):
        Q = _leading_left((A - L).transpose(0, 1).reshape(D, H * d), m)                     # (D, m)
        QA = Q.T @ A                                                                        # (H, m, d)
        rest = A - Q @ QA                                                                   # (H, D, d)
        V = _leading_right(rest, r)                                                         # (H, d, r)
        L = (rest @ V) @ V.mT                                                               # (H, D, d)
        history.append(((rest - L).square().sum() / total).sqrt().item())
        if len(history) > 1 and history[-2] - history[-1] < 1e-5 * history[-2]:
            break
    W_shared = metric.S.inverse @ Q                                                         # (D, m)
    C = Q.T @ (metric.S.root @ W)                                                           # (H, m, d)
    U, B = _residual(W, A, rest, Q, r, metric, V)
    return _finish(W, metric, W_shared, C, U, B, None, total, tuple(history))


def aligned(W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = SWEEPS) -> Factors:
    """C = I after a gauge. `rotary` restricts the gauge to maps that commute with RoPE."""
    _needs_head_width(W, m, "aligned")
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
    _needs_head_width(W, m, "mean")
    return _residual_after(W, metric, W.mean(0), None, r)


BASES: dict[str, Callable[..., Factors]] = {"joint": joint, "aligned": aligned, "mean": mean}


def _needs_head_width(W: Tensor, m: int, name: str) -> None:
    if m != W.shape[2]:
        raise ValueError(f"the {name} base is as wide as a head ({W.shape[2]}), got {m}")


def _leading_left(A: Tensor, m: int) -> Tensor:
    """Leading m left singular vectors of A (D, n), through the smaller Gram matrix."""
    D, n = A.shape
    if D <= n:
        return torch.linalg.eigh(A @ A.T).eigenvectors[:, -m:].flip(1)
    values, vectors = torch.linalg.eigh(A.T @ A)                                            # (n,), (n, n)
    Q = A @ vectors[:, -m:].flip(1)                                                         # (D, m), orthogonal columns
    return torch.linalg.qr(Q).Q if m <= n else _complete(torch.linalg.qr(Q).Q, m)


def _complete(Q: Tensor, m: int) -> Tensor:
    """Pad orthonormal columns (D, k) to (D, m) with zero columns: a base wider than the data spans needs no more."""
    return torch.cat((Q, Q.new_zeros(Q.shape[0], m - Q.shape[1])), dim=1)


def _leading_right(A: Tensor, r: int) -> Tensor:
    """Leading r right singular vectors of each A_h (H, D, d) -> (H, d, r)."""
    return torch.linalg.eigh(A.mT @ A).eigenvectors[..., A.shape[-1] - r:].flip(-1)


def _residual(W, A, rest, Q, r, metric, V=None) -> tuple[Tensor, Tensor]:
    """U, B with U_h B_h^T = S^-1 (rest_h V V^T) M_h^-1. S^-1 A_h is W_h M_h exactly, so only the base goes through S^-1."""
    V = _leading_right(rest, r) if V is None else V
    U = W @ metric.M.root @ V - metric.S.inverse @ Q @ (Q.T @ A @ V)                        # (H, D, r)
    return U, metric.M.inverse @ V                                                          # (H, d, r)


def _residual_after(W: Tensor, metric: Metric, W_shared: Tensor, gauge: Tensor | None, r: int, inverse: Tensor | None = None) -> Factors:
    """Given base and gauge, the best residual: truncated SVD of S (W_h - W_shared gauge_h) M_h, then taken into the gauge."""
    base = W_shared if gauge is None else W_shared @ gauge                                  # (D, d) or (H, D, d)
    rest = (W - base) @ metric.M.root                                                       # (H, D, d), without S
    V = _leading_right(metric.S.root @ rest, r)                                             # (H, d, r)
    U, B_T = rest @ V, V.mT @ metric.M.inverse                                              # (H, D, r), (H, r, d)
    if inverse is not None:
        B_T = B_T @ inverse
    total = (metric.S.root @ W @ metric.M.root).square().sum()
    return _finish(W, metric, W_shared, None, U, B_T.mT, gauge, total)


def _rotary_base(W: Tensor, metric: Metric, r: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Base and gauge for RoPE keys. Per frequency pair, the heads' complex columns are approximated by one column times a number per head:
    a rank-1 SVD, alternated with the residuals. Returns W_shared (D, d) and the gauge (H, d, d)."""
    H, D, d = W.shape
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


def _empty_base(W: Tensor) -> Tensor:
    return W.new_zeros(W.shape[1], 0)


def _finish(W, metric, W_shared, C, U, B, gauge, total, history=()) -> Factors:
    factors = Factors(W_shared, C, U, B, gauge, 0.0, history)
    error = (metric.S.root @ (W - factors.heads()) @ metric.M.root).square().sum()
    return Factors(W_shared, C, U, B, gauge, (error / total).sqrt().item() if total > 0 else 0.0, history)
