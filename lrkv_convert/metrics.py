"""In which norm a key or value matrix is fitted: the one attention itself uses (DESIGN: the metric decides the quality, not the rank alone).

For one layer, minimise  sum_h || Sigma^(1/2) (W_h - What_h) M_h^(1/2) ||_F^2  with

    keys     Sigma_K = sum_t w_t x_t x_t^T          w_t: attention mass token t receives, summed over queries and heads
             M_h     = sum g g^T                    g: gradient of the loss at the key (sensitivity.py)
    values   Sigma_V = sum_s z_s z_s^T              z_s = sum_t a_st x_t, the attention-averaged input, for every head
             M_h     = sum g g^T                    g: gradient at the head's output

Plain X^T X would weigh the first token, the attention sink, like any other, which costs most of the quality. The other metrics are here to be
compared with: "attention" has M_h = sum q q^T for keys (under RoPE its average over all rotations) and sum W_O,h W_O,h^T for values, which needs
no gradient; "whitened" has Sigma = X^T X and M = I (Palu, SVD-LLM), "plain" the identity for both. float64 throughout.
Shapes: H KV heads, G queries per KV head, D width, d head width, T tokens.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import AttentionWeights, Geometry

METRICS = ("fisher", "attention", "whitened", "plain")
SHRINKAGE = 0.01        # share of the mean eigenvalue added to Sigma; from 1 % to 10 % it made no difference (benchmarks/NOTES.md)
FLOOR = 1e-7            # smallest eigenvalue kept, relative to the largest: square roots must invert


@dataclass(frozen=True)
class Root:
    """Symmetric square root of a positive matrix and its inverse, both (..., n, n) float64."""

    root: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Metric:
    """Norm for one side (keys or values) of one layer: S = Sigma^(1/2) (D, D), M = M_h^(1/2) (H, d, d)."""

    S: Root
    M: Root


@dataclass(frozen=True)
class LayerMetrics:
    keys: Metric
    values: Metric


@dataclass(frozen=True)
class HeadMoments:
    """Gradient second moments per token of one layer, (H, d, d) float64 each (sensitivity.py)."""

    keys: Tensor
    values: Tensor


def square_root(matrix: Tensor) -> Root:
    """Symmetric root of (..., n, n), eigenvalues floored at FLOOR of the largest. A zero matrix gives the identity."""
    values, vectors = torch.linalg.eigh(matrix.double())                                    # (..., n), (..., n, n)
    top = values[..., -1:]
    values = torch.where(top > 0, torch.maximum(values, FLOOR * top), torch.ones_like(values))
    half = values.sqrt()
    return Root((vectors * half.unsqueeze(-2)) @ vectors.mT, (vectors / half.unsqueeze(-2)) @ vectors.mT)


def shrink(sigma: Tensor, share: float = SHRINKAGE) -> Tensor:
    """Add a share of the mean eigenvalue to the diagonal."""
    D = sigma.shape[-1]
    return sigma + share * sigma.diagonal().mean() * torch.eye(D, dtype=sigma.dtype, device=sigma.device)


class MetricSums:
    """Accumulates one layer's second moments over batches of (input, attention)."""

    def __init__(self, weights: AttentionWeights, geometry: Geometry):
        self.weights, self.geometry = weights, geometry
        H, D, d = geometry.kv_heads, geometry.width, geometry.head_dim
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=weights.W_K.device)
        self.inputs, self.keys, self.values, self.queries, self.tokens = zeros(D, D), zeros(D, D), zeros(D, D), zeros(H, d, d), 0

    def add(self, x: Tensor, attention: Tensor) -> None:
        """x (N, T, D): input of the attention module; attention (N, H G, T, T): its weights. float32 products, float64 sums."""
        for x, a in zip(x, attention):                                                      # (T, D), (H G, T, T)
            mass = a.sum((0, 1))                                                            # (T,)
            self.inputs += (x.T @ x).double()                                               # (D, D)
            self.keys += (x.T @ (mass.unsqueeze(1) * x)).double()                           # (D, D)
            pooled = (a.mT @ a).sum(0)                                                      # (T, T): sum_h A_h^T A_h
            self.values += (x.T @ (pooled @ x)).double()                                    # (D, D): sum_h Z_h^T Z_h
            q = torch.einsum("td,hgde->hgte", x, self.weights.W_Q.to(x.dtype))              # (H, G, T, d)
            if self.weights.b_Q is not None:
                q = q + self.weights.b_Q.to(x.dtype).unsqueeze(2)
            self.queries += torch.einsum("hgte,hgtf->hef", q, q).double()                   # (H, d, d)
            self.tokens += x.shape[0]


def layer_metrics(weights: AttentionWeights, geometry: Geometry, name: str = "attention", sums: MetricSums | None = None,
                  moments: HeadMoments | None = None) -> LayerMetrics:
    """The metrics called `name`. Without sums (no calibration text) inputs are taken as white and queries follow from W_Q; "fisher" needs moments."""
    H, D, d = geometry.kv_heads, geometry.width, geometry.head_dim
    white = torch.eye(D, dtype=torch.float64, device=weights.W_K.device)
    W_Q, W_O, heads = weights.W_Q.double(), weights.W_O.double(), geometry.kv_heads * geometry.groups
    sigma_K, sigma_V, queries = white, white, torch.einsum("hgde,hgdf->hef", W_Q, W_Q)
    if sums is not None:        # per token and query head, so that errors of different layers compare
        sigma_K, sigma_V, queries = sums.keys / (heads * sums.tokens), sums.values / (heads * sums.tokens), sums.queries / sums.tokens
    if name in ("whitened", "plain"):
        sigma = square_root(shrink(sums.inputs / sums.tokens)) if name == "whitened" and sums is not None else Root(white, white)
        identity = torch.eye(d, dtype=torch.float64, device=white.device).expand(H, d, d)
        return LayerMetrics(*(Metric(sigma, Root(identity, identity)) for _ in range(2)))
    keys = rotation_average(queries) if geometry.rotary else queries
    values = torch.einsum("hgeD,hgfD->hef", W_O, W_O)                                       # (H, d, d)
    if name == "fisher":
        keys, values = moments.keys, moments.values
    return LayerMetrics(Metric(square_root(shrink(sigma_K)), square_root(keys)), Metric(square_root(shrink(sigma_V)), square_root(values)))


def rotation_average(M: Tensor) -> Tensor:
    """E over angles of Rot(t) M Rot(t)^T with one independent angle per frequency pair: diagonal, shared by the two halves of a pair."""
    left, right = M.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)                             # (H, d/2) each
    pair = (left + right) / 2
    return torch.diag_embed(torch.cat((pair, pair), dim=-1))                                # (H, d, d)
