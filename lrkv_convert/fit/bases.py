"""Fit the factors of one side (keys or values) of one layer.

    W_h ~ W_shared C_h + U_h B_h^T        minimising  sum_h || Sigma^(1/2) (W_h - What_h) M_h
                                          ||_F^2,   M_h here for M_h^(1/2)

    joint     base and residuals fitted together (Joint and Individual Variation Explained, Lock et
              al. 2013): alternate the leading left
              singular vectors of [A_1 - L_1 ... A_H - L_H] with rank-r truncations L_h of (I - Q
              Q^T) A_h, where A_h = Sigma^(1/2) W_h M_h
    aligned   the paper's own form, C_h = I, after a gauge that the partner (W_Q or W_O) absorbs.
              Values and keys without RoPE: any invertible
              map. Keys under RoPE: one complex number per frequency pair, all that commutes with
              the rotation (PAPER section 4)
    mean      W_shared = the plain mean of W_h. Here to be compared with: it destroys pretrained
              models
    pooled    heads replaced by the means of groups of heads: multi-query and grouped-query
              attention, as "uptraining" starts. No residual
    grouped   one latent per group of heads, no residual: Palu's G-LRD. (m = 0 of joint is its
              M-LRD, r = 0 its J-LRD, the latent of MLA)

Where the metric has a Sigma per head (values), the joint fit is then refined for those
(fit/per_head.py).

No root of Sigma is ever taken. Every left vector that matters lies in the span of the A_h, q = [A_1
... A_H] y, so the fit needs only the Gram matrix K = [A_1 ... A_H]^T [A_1 ... A_H] of n = H d
columns, and W_shared = [W_1 M_1 ... W_H M_H] y comes back without an inverse.

Everything is float64, whatever W comes in. Shapes: H heads, D width, d head width, m base width, r
rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .metric import (
    RANK_FLOOR,
    Metric,
    head_basis,
    inverse_root,
    rotation_average,
    runs,
    square_root,
)
from .per_head import refine

SWEEPS = 12
GROUP_SIZE = 4
STOP = 1e-5  # relative fall of the error below which the alternation ends
EIGH_UP_TO = 1024  # columns; a full eigendecomposition is the faster way below, and exact
OVERSAMPLE, START_STEPS, WARM_STEPS = 16, 8, 2
# singular values of a gauge, relative to the largest: its inverse multiplies B, which must survive
# bf16
GAUGE_FLOOR = 1e-3


@dataclass(frozen=True)
class Factors:
    """One side of one layer, float64.

    W_shared (D, m), C (H, m, d) or None for C = I, U (H, D, r), B (H, d, r); gauge (H, d, d) or
    None: the true head is What_h gauge_h, and the partner is to absorb gauge_h; error: relative, in
    the fitted metric (of values under the joint base that with a Sigma per head, where there is
    one; of other bases that with one Sigma for all); history: the same after each sweep.
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
        return torch.stack([self.head(h) for h in range(len(self.B))])

    def head(self, h: int) -> Tensor:
        """One of them, (D, d)."""
        W = self.U[h] @ self.B[h].T
        if self.W_shared.shape[1]:
            W = W + (self.W_shared if self.C is None else self.W_shared @ self.C[h])
        return W if self.gauge is None else W @ self.gauge[h]


def joint(
    W: Tensor,
    metric: Metric,
    m: int,
    r: int,
    rotary: bool = False,
    sweeps: int = SWEEPS,
    eigh_up_to: int = EIGH_UP_TO,
) -> Factors:
    """Joint fit of W (H, D, d). eigh_up_to: columns H d up to which bases are found by a full
    eigendecomposition.
    """
    H, _D, d = W.shape
    # (D, n), (n, n)
    weighted, K = _gram(W, metric)
    # (n, m), (H, d, r)
    y, V, history = _alternate(K, H, m, r, sweeps, eigh_up_to=eigh_up_to)
    if metric.grams is not None:
        return _refined(W, metric, weighted @ y, r)
    # (D, m), (H, m, d): Q^T A_h
    W_shared, QA, total = weighted @ y, (y.T @ K).view(m, H, d).transpose(0, 1), K.diagonal().sum()
    del K
    # U_h B_h^T = Sigma^(-1/2) (A_h - Q Q^T A_h) V V^T M_h^-1
    U = torch.stack(
        [part @ v - W_shared @ (qa @ v) for part, qa, v in zip(weighted.split(d, dim=1), QA, V)]
    )
    del weighted
    return _finish(
        W,
        metric,
        W_shared,
        QA @ metric.M.inverse if m else None,
        U,
        metric.M.inverse @ V,
        None,
        total,
        history,
    )


def _refined(W: Tensor, metric: Metric, W_shared: Tensor, r: int) -> Factors:
    """The joint fit with a Sigma per head, from the base of that with one."""
    assert metric.grams is not None
    Q, W = head_basis(W), W.double()
    y, C, rest, V, history = refine(metric.grams, Q.T @ W @ metric.M.root, Q.T @ W_shared, r)
    return Factors(
        Q @ y,
        C @ metric.M.inverse if y.shape[1] else None,
        Q @ rest,
        metric.M.inverse @ V,
        None,
        history[-1],
        history,
    )


def error_curve(
    W: Tensor, metric: Metric, shapes: list[tuple[int, int]], sweeps: int = 2
) -> list[float]:
    """Squared error of the joint fit, absolute, for each (m, r). Without residuals it is the
    discarded singular values of all heads.
    """
    K, H = _gram(W, metric)[1], W.shape[0]
    # tail[m]: all beyond the first m
    tail = torch.linalg.eigvalsh(K).clamp_min(0).cumsum(0).flip(0).tolist()
    total = K.diagonal().sum().item()
    first = {m: _leading(K, m, None) for m, r in shapes if r and m}
    return [
        (
            (tail[m] if m < len(tail) else 0.0)
            if r == 0
            else _alternate(K, H, m, r, sweeps, first.get(m))[2][-1] ** 2 * total
        )
        for m, r in shapes
    ]


def joint_gains(W: Tensor, metric: Metric, shares: Tensor) -> tuple[Tensor, Tensor]:
    """What each latent of the joint fit without residuals is worth, largest first: its squared
    singular value, (n,), and the share of noise on it that is seen, by that of heads (H,).
    """
    K, (H, _, d) = _gram(W, metric)[1], W.shape
    sizes, y = torch.linalg.eigh((K + K.T) / 2)
    gains = sizes.clamp_min(0).flip(0)
    of_heads = y.flip(1).view(H, d, -1).square().sum(1)  # (H, n): Q^T A_h = sigma y_h
    return gains, (of_heads * shares.unsqueeze(1)).sum(0)


def rotary_error_curve(
    W: Tensor, metric: Metric, shapes: list[tuple[int, int]], sweeps: int = 2
) -> list[float]:
    """The same for bases that commute with RoPE (`aligned`), all d wide."""
    total = _gram(W, metric)[1].diagonal().sum().item()
    return [
        aligned(W, metric, m, r, rotary=True, sweeps=sweeps).error ** 2 * total for m, r in shapes
    ]


def _gram(W: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """[W_1 M_1 ... W_H M_H] (D, n) and K = [A_1 ... A_H]^T [A_1 ... A_H] (n, n), n = H d."""
    weighted = torch.cat([w.double() @ M for w, M in zip(W, metric.M.root)], dim=1)  # (D, n)
    return weighted, weighted.T @ (metric.sigma @ weighted)


def _alternate(
    K: Tensor,
    H: int,
    m: int,
    r: int,
    sweeps: int,
    first: Tensor | None = None,
    eigh_up_to: int = EIGH_UP_TO,
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """y (n, m) and V (H, d, r) minimising sum_h || (I - Q Q^T) A_h (I - V_h V_h^T) ||^2 with Q =
    [A_1 ... A_H] y, and the relative error per sweep.

    y^T K y = I, but for columns beyond the rank of K, which are zero. first: the leading y of K, if
    it is known.
    """
    n = len(K)
    d = n // H
    total = K.diagonal().sum().clamp_min(torch.finfo(K.dtype).tiny)
    # (H, d, d): A_h^T A_h
    own = K.view(H, d, H, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    y, V, history = K.new_zeros(n, 0), K.new_zeros(H, d, 0), []
    for _ in range(sweeps if m and r else 1):
        if m:
            y = (
                _leading(K, m, _Remaining(K, y, V), eigh_up_to)
                if history
                else first
                if first is not None
                else _leading(K, m, None, eigh_up_to)
            )
        # (H, m, d): Q^T A_h
        F = (y.T @ K).view(m, H, d).transpose(0, 1)
        # of (I - Q Q^T) A_h, ascending
        sizes, vectors = torch.linalg.eigh(own - F.mT @ F)
        # (H, d, r)
        V = vectors[..., d - r :].flip(-1)
        history.append((sizes[:, : d - r].clamp_min(0).sum() / total).sqrt().item())
        if len(history) > 1 and history[-2] - history[-1] < STOP * history[-2]:
            break
    return y, V, tuple(history)


class _Remaining:
    """What the base is left to explain: [A_1 - L_1 ...] = [A_1 ...] Z with Z = I - P + y F P, P =
    diag(V_h V_h^T), F = Q^T [A_1 ...].
    """

    def __init__(self, K: Tensor, y: Tensor, V: Tensor):
        self.y, self.V, self.F = y, V, y.T @ K

    def _project(self, X: Tensor) -> Tensor:
        H, d, _ = self.V.shape
        return (self.V @ (self.V.mT @ X.view(H, d, -1))).view(X.shape)

    def times(self, X: Tensor) -> Tensor:
        """Z X"""
        P = self._project(X)
        return X - P + self.y @ (self.F @ P)

    def transposed_times(self, X: Tensor) -> Tensor:
        """Z^T X"""
        return X - self._project(X - self.F.T @ (self.y.T @ X))


def _leading(K: Tensor, m: int, Z: _Remaining | None, eigh_up_to: int = EIGH_UP_TO) -> Tensor:
    """y (n, m) such that Q = A y are the leading left singular vectors of A Z, for A^T A = K; Z
    None is the identity.

    Up to `eigh_up_to` columns by an eigendecomposition; beyond, a few steps of subspace iteration,
    from the previous y where there is one (each step lowers the error: tr Q^T G Q grows under Q <-
    orth(G Q) for positive G), from a random start otherwise (Halko et al. 2011).
    """
    n = len(K)
    if n <= eigh_up_to or m > n // 2:
        T = K if Z is None else Z.transposed_times(Z.transposed_times(K).T)
        sizes, v = (
            part[..., max(n - m, 0) :].flip(-1) for part in torch.linalg.eigh((T + T.T) / 2)
        )
        return _scaled(v if Z is None else Z.times(v), sizes, m, K)
    if Z is None or Z.y.shape[1] < m:
        y, steps = (
            torch.randn(
                n, m + OVERSAMPLE, dtype=K.dtype, generator=torch.Generator().manual_seed(0)
            ).to(K.device),
            START_STEPS,
        )
    else:
        y, steps = Z.y, WARM_STEPS
    for _ in range(steps):
        y = K @ y if Z is None else Z.times(Z.transposed_times(K @ y))
        y = y @ inverse_root(y.T @ (K @ y))
    if y.shape[1] > m:  # Rayleigh-Ritz: the best m of the oversampled directions
        right = K @ y if Z is None else Z.transposed_times(K @ y)
        y = y @ torch.linalg.eigh(right.T @ right).eigenvectors.flip(1)[:, :m]
    return y


def _scaled(y: Tensor, sizes: Tensor, m: int, K: Tensor) -> Tensor:
    """Columns of y divided by their singular values, those beyond the rank of K and up to m
    zero.
    """
    y = y * torch.where(sizes > RANK_FLOOR * K.diagonal().max(), sizes, torch.inf).rsqrt()
    return torch.cat((y, y.new_zeros(len(y), m - y.shape[1])), dim=1)


def aligned(
    W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = SWEEPS
) -> Factors:
    """C = I after a gauge. `rotary` restricts the gauge to maps that commute with RoPE."""
    check_shape("aligned", W.shape[0], W.shape[2], m, r)
    if rotary:
        W_shared, gauge = _rotary_base(W, metric, r, sweeps)
    else:
        fit = joint(W, replace(metric, grams=None), m, r, sweeps=sweeps)
        W_shared, gauge = fit.W_shared, fit.C
    # (H, d, d), (H, d), (H, d, d)
    left, sizes, right = torch.linalg.svd(gauge)
    top = sizes[:, :1]
    # a dead head keeps a gauge that inverts
    sizes = torch.where(top > 0, torch.maximum(sizes, GAUGE_FLOOR * top), torch.ones_like(sizes))
    gauge = left * sizes.unsqueeze(-2) @ right
    return _residual_after(
        W, metric, W_shared, gauge, r, inverse=right.mT / sizes.unsqueeze(-2) @ left.mT
    )


def mean(
    W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0
) -> Factors:
    """The plain mean as base, C = I, residuals truncated in the metric."""
    check_shape("mean", W.shape[0], W.shape[2], m, r)
    return _residual_after(W, metric, W.double().mean(0), None, r)


def pooled(
    W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0
) -> Factors:
    """Mean-pooled heads: m / d groups of heads share their mean; one group is multi-query, several
    are grouped-query attention.
    """
    H, D, d = W.shape
    check_shape("pooled", H, d, m, r)
    W = W.double()
    groups = runs(H, m // d)
    C = W.new_zeros(H, m, d)
    for g, members in enumerate(groups):
        C[members, g * d : (g + 1) * d] = torch.eye(d, dtype=W.dtype, device=W.device)
    return _finish(
        W,
        metric,
        torch.cat([W[members].mean(0) for members in groups], dim=1),
        C,
        W.new_zeros(H, D, 0),
        W.new_zeros(H, d, 0),
        None,
    )


def grouped(
    W: Tensor, metric: Metric, m: int, r: int, rotary: bool = False, sweeps: int = 0
) -> Factors:
    """One latent per group of about four heads, at least two groups (Palu's G-LRD), each m / groups
    wide.
    """
    H, D, d = W.shape
    check_shape("grouped", H, d, m, r)
    W = W.double()
    groups = runs(H, group_count(H))
    (weighted, K), rho = _gram(W, metric), m // len(groups)
    C, shared = W.new_zeros(H, m, d), []
    for g, members in enumerate(groups):
        columns = slice(members.start * d, members.stop * d)
        # (n / groups, rho)
        y = _leading(K[columns, columns], rho, None)
        C[members, g * rho : (g + 1) * rho] = (y.T @ K[columns, columns]).view(
            rho, -1, d
        ).transpose(0, 1) @ metric.M.inverse[members]
        shared.append(weighted[:, columns] @ y)
    return _finish(
        W, metric, torch.cat(shared, dim=1), C, W.new_zeros(H, D, 0), W.new_zeros(H, d, 0), None
    )


def check_shape(base: str, H: int, d: int, m: int, r: int) -> None:
    """Raise ValueError for a base width and rank that a base cannot have."""
    if base in UNALIGNED and m != d:
        raise ValueError(f"the {base} base is as wide as a head ({d}), got {m}")
    if base == "pooled" and (m % d or not 0 < m <= H * d or r):
        raise ValueError(
            f"pooled heads need a base of 1 to {H} times {d} and rank 0, got {m} and {r}"
        )
    if base == "grouped" and (m % group_count(H) or r):
        raise ValueError(
            f"grouped latents need a base width divisible by {group_count(H)} and rank 0, got {m}"
            f" and {r}"
        )


def group_count(H: int) -> int:
    """How many groups `grouped` makes of H heads."""
    return max(2, H // GROUP_SIZE)


BASES: dict[str, Callable[..., Factors]] = {
    "joint": joint,
    "aligned": aligned,
    "mean": mean,
    "pooled": pooled,
    "grouped": grouped,
}
UNALIGNED = ("aligned", "mean")  # bases with C = I


def _residual_after(
    W: Tensor,
    metric: Metric,
    W_shared: Tensor,
    gauge: Tensor | None,
    r: int,
    inverse: Tensor | None = None,
) -> Factors:
    """Given base and gauge, the best residual: truncated SVD of Sigma^(1/2) (W_h - W_shared
    gauge_h) M_h, then taken into the gauge.
    """
    # (D, d) or (H, D, d)
    base = W_shared if gauge is None else W_shared @ gauge
    # (H, D, d), without Sigma
    rest = (W.double() - base) @ metric.M.root
    # (H, d, r)
    V = _last(torch.linalg.eigh(rest.mT @ (metric.sigma @ rest)).eigenvectors, r)
    # (H, D, r), (H, r, d)
    U, B_T = rest @ V, V.mT @ metric.M.inverse
    if inverse is not None:
        B_T = B_T @ inverse
    return _finish(W, metric, W_shared, None, U, B_T.mT, gauge)


def _rotary_base(W: Tensor, metric: Metric, r: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Base and gauge for RoPE keys. Per frequency pair, the heads' complex columns are approximated
    by one column times a number per head: a rank-1 SVD, alternated with the residuals, in the
    rotation average of the metric. Returns W_shared (D, d) and the gauge (H, d, d).
    """
    H, _D, d = W.shape
    metric = Metric(metric.sigma, square_root(rotation_average(metric.M.root @ metric.M.root, d)))
    weighted, K = _gram(W, metric)
    # A in n coordinates: same inner products
    root = square_root(K)
    # (H, n, d); M is diagonal, equal in a pair
    A = root.root.view(-1, H, d).transpose(0, 1)
    # (H, d/2)
    scale = metric.M.root.diagonal(dim1=-2, dim2=-1)[:, : d // 2]
    L = torch.zeros_like(A)
    for _ in range(max(sweeps, 1)):
        # (d/2, n, H)
        columns = _complex(A - L).permute(2, 1, 0)
        # (d/2, H, 1)
        vectors = torch.linalg.eigh(columns.mH @ columns).eigenvectors[..., -1:]
        # (d/2, n, 1)
        shared = columns @ vectors
        # (H, n, d)
        rest = A - _real((shared @ vectors.mH).permute(2, 1, 0))
        # (H, d, r)
        V = _last(torch.linalg.eigh(rest.mT @ rest).eigenvectors, r)
        L = rest @ V @ V.mT
    # (H, d/2)
    coefficients = vectors.squeeze(-1).conj().T / scale
    return weighted @ (root.inverse @ _real(shared.squeeze(-1).T.unsqueeze(0))[0]), _pair_maps(
        coefficients
    )


def _last(vectors: Tensor, r: int) -> Tensor:
    """The last r of ascending eigenvectors (..., n), largest first."""
    return vectors[..., vectors.shape[-1] - r :].flip(-1)


def _complex(A: Tensor) -> Tensor:
    """(..., d) in half-split RoPE layout -> (..., d/2) complex: rotating by an angle is multiplying
    by exp(i angle).
    """
    left, right = A.chunk(2, dim=-1)
    return torch.complex(left.contiguous(), right.contiguous())


def _real(Z: Tensor) -> Tensor:
    return torch.cat((Z.real, Z.imag), dim=-1)


def _pair_maps(c: Tensor) -> Tensor:
    """Complex numbers per head and pair (H, d/2) as maps (H, d, d) acting on row vectors."""
    a, b = torch.diag_embed(c.real), torch.diag_embed(c.imag)
    return torch.cat((torch.cat((a, b), -1), torch.cat((-b, a), -1)), -2)


def _finish(W, metric, W_shared, C, U, B, gauge, total=None, history=()) -> Factors:
    """The factors with their error, measured on what they stand for, a head at a time. total: sum_h
    || Sigma^(1/2) W_h M_h ||^2, if it is known.
    """

    def squared(head):
        # (D, d) each
        parts = (head(h) @ metric.M.root[h] for h in range(len(W)))
        return cast(Tensor, sum((E * (metric.sigma @ E)).sum() for E in parts)).clamp_min(0)

    factors = Factors(W_shared, C, U, B, gauge, 0.0, history)
    total = squared(lambda h: W[h].double()) if total is None else total
    error = squared(lambda h: W[h].double() - factors.head(h))
    return replace(factors, error=(error / total).sqrt().item() if total > 0 else 0.0)
