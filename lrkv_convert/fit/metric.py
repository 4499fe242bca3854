"""In which norm a key or value matrix is fitted: the one attention itself uses.

For one layer, minimise  sum_h || Sigma^(1/2) (W_h - What_h) M_h^(1/2) ||_F^2  with

    keys     Sigma_K = sum_t w_t x_t x_t^T          w_t: attention mass token t receives, summed
             over queries and heads
             M_h     = sum g g^T                    g: gradient of the loss at the key
                     (observe/sensitivity.py)
    values   Sigma_V = sum_s z_s z_s^T              z_s = sum_t a_st x_t, the attention-averaged
             input; for each head its own (`Metric.grams`)
             M_h     = sum g g^T                    g: gradient at the head's output

Plain X^T X would weigh the first token, the attention sink, like any other, which costs most of the
quality. The other metrics are here to be compared with: "attention" has M_h = sum q q^T for keys
(under RoPE its average over all rotations) and sum W_O,h W_O,h^T for values, which needs no
gradient; "whitened" has Sigma = X^T X and M = I (Palu, SVD-LLM), "plain" the identity for both.
float64 throughout. Shapes: H KV heads, G queries per KV head, D width, d head width, T tokens.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families import AttentionWeights, Geometry
from .codes import Spread

METRICS = ("fisher", "attention", "whitened", "plain")
ATTENDED = {"fisher", "attention"}  # those that weigh inputs by attention
# share of the mean eigenvalue added to Sigma; from 1 % to 10 % it made no difference
# (benchmarks/NOTES.md)
SHRINKAGE = 0.01
# heads have a Sigma_V of their own, or runs of neighbouring heads one together: at most so many in
# a layer
RUNS = 8
# ... which are to hold no more numbers than this; with fewer than half as many runs as there would
# be, all heads share one
GRAM_NUMBERS = 1 << 25
RANK_FLOOR = 1e-14  # eigenvalues below this share of the largest are rounding
# smallest eigenvalue of M_h kept, relative to the largest: its root must invert
FLOOR = 1e-7


@dataclass(frozen=True)
class Root:
    """Symmetric square root of a positive matrix and its inverse, both (..., n, n) float64."""

    root: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Metric:
    """Norm for one side (keys or values) of one layer: Sigma (D, D), and M = M_h^(1/2) (H, d, d).
    float64.

    grams (runs, k, k) or None: where heads have a Sigma of their own, of which the one above is the
    mean, Q^T Sigma_h Q for `runs` of heads that share one, with Q = `head_basis` of the matrices
    that are fitted.

    spread, shares (H,): where latents are to be codes, how inputs lie and how much of the noise of
    each head is seen (fit/codes.py); Sigma is their covariance then.
    """

    sigma: Tensor
    M: Root
    grams: Tensor | None = None
    spread: Spread | None = None
    shares: Tensor | None = None

    def of(self, heads: slice) -> "Metric":
        """That of some of the heads, where they have no Sigma of their own."""
        root = Root(self.M.root[heads], self.M.inverse[heads])
        shares = None if self.shares is None else self.shares[heads]
        return replace(self, M=root, grams=None, shares=shares)


@dataclass(frozen=True)
class HeadMoments:
    """Gradient second moments per token of one layer, (H, d, d) float64 each
    (observe/sensitivity.py).
    """

    keys: Tensor
    values: Tensor


def square_root(matrix: Tensor) -> Root:
    """Symmetric root of (..., n, n), eigenvalues floored at FLOOR of the largest. A zero matrix
    gives the identity.
    """
    # (..., n), (..., n, n)
    values, vectors = torch.linalg.eigh(matrix.double())
    top = values[..., -1:]
    values = torch.where(top > 0, torch.maximum(values, FLOOR * top), torch.ones_like(values))
    half = values.sqrt()
    return Root(
        (vectors * half.unsqueeze(-2)) @ vectors.mT, (vectors / half.unsqueeze(-2)) @ vectors.mT
    )


def inverse_root(G: Tensor) -> Tensor:
    """X with X^T G X = I on the span of a positive matrix (n, n), zero beyond it."""
    if not len(G):
        return G
    sizes, vectors = torch.linalg.eigh((G + G.T) / 2)
    return vectors * torch.where(sizes > RANK_FLOOR * sizes[-1], sizes, torch.inf).rsqrt()


def runs(heads: int, count: int) -> list[slice]:
    """Heads 0 to H - 1 in `count` runs of nearly equal length."""
    ends = [i * (heads // count) + min(i, heads % count) for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def run_count(geometry: Geometry) -> int:
    """How many runs of heads have a Sigma_V of their own in each layer: 0 where there is one head,
    or it would take too much memory.
    """
    wanted, k = (
        min(RUNS, geometry.kv_heads),
        min(geometry.kv_heads * geometry.head_dim, geometry.width),
    )
    count = min(wanted, GRAM_NUMBERS // k**2)
    return count if count > 1 and 2 * count >= wanted else 0


def head_basis(W: Tensor) -> Tensor:
    """Orthonormal columns (D, k) float64, k = min(H d, D), whose span holds those of all heads W
    (H, D, d). The same for the same W: signs are fixed.
    """
    Q, R = torch.linalg.qr(W.double().transpose(0, 1).flatten(1))
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def shrunk(sigma: Tensor, share: float = SHRINKAGE) -> Tensor:
    """A matrix of ours (n, n) with a share of its mean eigenvalue added to the diagonal, in
    place.
    """
    sigma.diagonal().add_(share * sigma.diagonal().mean())
    return sigma


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics called `name` of one layer's keys and values, each made when it is asked for:
    they are large.

    sums: `MetricSums.state()`; without them (no calibration text) inputs are taken as white and
    queries follow from W_Q. "fisher" needs moments; spread: how inputs lie, for codes.
    """

    weights: AttentionWeights
    geometry: Geometry
    name: str = "attention"
    sums: dict | None = None
    moments: HeadMoments | None = None
    spread: Spread | None = None

    def side(self, name: str, coded: bool) -> Metric:
        """That of "keys" or of "values". coded: where their latents are to be codes, which needs a
        spread.
        """
        if not coded:
            return self.keys if name == "keys" else self.values
        assert self.spread is not None
        M = None
        if self.name == "fisher":
            assert self.moments is not None
            M = getattr(self.moments, name)
        shares = self.spread.shares if name == "values" else torch.ones_like(self.spread.shares)
        # shrunk: directions that calibration never saw must not reach beyond all codes
        sigma = shrunk(self.spread.covariance.clone())
        return Metric(sigma, self._root(M), None, replace(self.spread, covariance=sigma), shares)

    @property
    def keys(self) -> Metric:
        M = None
        if self.name == "fisher":
            assert self.moments is not None
            M = self.moments.keys
        elif self.name == "attention":
            W_Q = self.weights.W_Q.double()
            M = (
                self.sums["queries"].double() / self.sums["tokens"]
                if self.sums
                else torch.einsum("hgde,hgdf->hef", W_Q, W_Q)
            )
            M = rotation_average(M, self.geometry.rotary_dim) if self.geometry.rotary else M
        return Metric(self._sigma("keys"), self._root(M))

    @property
    def values(self) -> Metric:
        M = None
        if self.name == "fisher":
            assert self.moments is not None
            M = self.moments.values
        elif self.name == "attention":
            W_O = self.weights.W_O.double()
            # (H, d, d)
            M = torch.einsum("hgeD,hgfD->hef", W_O, W_O)
        return Metric(self._sigma("values"), self._root(M), self._grams())

    def _grams(self) -> Tensor | None:
        if not self.sums or self.sums["heads"] is None or self.name not in ATTENDED:
            return None
        H, grams, count = (
            self.geometry.kv_heads,
            self.sums["heads"].double(),
            self.sums["tokens"] * self.geometry.groups,
        )
        for gram, heads in zip(grams, runs(H, len(grams))):
            gram.div_(count * (heads.stop - heads.start))
        mean = self.sums["values"].double().diagonal().mean() / (count * H)
        # as `shrunk`, in these coordinates
        grams.diagonal(dim1=1, dim2=2).add_(SHRINKAGE * mean)
        return grams.add_(grams.mT.clone()).div_(2)

    def _sigma(self, side: str) -> Tensor:
        name = {"plain": None, "whitened": "inputs"}.get(self.name, side)
        if not self.sums or name is None:
            return torch.eye(
                self.geometry.width, dtype=torch.float64, device=self.weights.W_K.device
            )
        # per token and, where heads attend, per query head, so that errors of different layers
        # compare
        count = self.sums["tokens"] * (
            1 if name == "inputs" else self.geometry.kv_heads * self.geometry.groups
        )
        return shrunk(self.sums[name].double().div_(count))

    def _root(self, M: Tensor | None) -> Root:
        H, d = self.geometry.kv_heads, self.geometry.head_dim
        identity = torch.eye(d, dtype=torch.float64, device=self.weights.W_K.device).expand(H, d, d)
        if M is None:
            return Root(identity, identity)
        sizes = M.diagonal(dim1=-2, dim2=-1).sum(-1)  # (H,)
        # a dead head counts for next to nothing, not for as much as the identity
        floor = torch.where(sizes > 0, 0.0, FLOOR * sizes.max() / d)
        return square_root(M + floor[:, None, None] * identity)


def rotation_average(M: Tensor, rotary_dim: int) -> Tensor:
    """E over angles of Rot(t) M Rot(t)^T (H, d, d) with one independent angle per frequency pair:
    diagonal where channels turn, shared by the two halves of a pair; unchanged among those that do
    not; nothing between the two.
    """
    # (H, rotary_dim / 2) each
    left, right = M.diagonal(dim1=-2, dim2=-1)[..., :rotary_dim].chunk(2, dim=-1)
    pair = (left + right) / 2
    averaged = torch.zeros_like(M)
    averaged[..., :rotary_dim, :rotary_dim] = torch.diag_embed(torch.cat((pair, pair), dim=-1))
    averaged[..., rotary_dim:, rotary_dim:] = M[..., rotary_dim:, rotary_dim:]
    return averaged
