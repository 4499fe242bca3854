"""Latents that turn with RoPE: each belongs to one frequency, is shared by all heads, and lies
rotated in the cache. Nothing is rebuilt when a key is read.

RoPE multiplies channel pair j of every head by the same number exp(i t theta_j), so it commutes
with any complex mix of the heads at one frequency. With w_hj = left + i right the complex columns
of W_K, s_hj^2 the metric of that pair averaged over its rotations, and A_j = [s_1j w_1j ... s_Hj
w_Hj] (D, H),

    A_j^H Sigma A_j = V_j diag(lambda_j) V_j^H        a unitary mix of the heads, H x H
    z_ja = x A_j v_ja                                 a latent, two numbers
    K_hj ~ sum_a c_hja z_ja,   c_hja = conj(v_hja) / s_hj

keeps the latents of the largest lambda over all frequencies; the error is the sum of the others.
All 2 H d / 2 = H d numbers are the keys themselves, mixed. A bias b is one more token, of weight
one: b_hj counts in A_j as a row, and z has a bias of its own.

Shapes: H heads, D width, d head width, n latents, m = 2 n numbers.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.metric import Metric, rotation_average
from .base import WIDTH_STEP, Asked, Fitted, Form, Shape, query_heads
from .rotary import check_whole_heads


class Commuting(Form):
    name = runtime = "commuting"
    says = (
        "latents of all heads, one RoPE frequency each, after rotation: nothing to rebuild, and"
        " each query head reads all of them"
    )
    sized = True

    def check_geometry(self, geometry, base, config):
        check_whole_heads(self.name, geometry)

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """A base one head wide; without any rank of either side as many numbers as halve the
        cache.
        """
        if asked.own_rank:
            raise LrkvError(
                f"--keys {self.name} has no residuals, and a rank of {asked.own_rank} asks for"
                " some",
                "leave --rank-k out or 0, and see --base-width-k",
            )
        width, d = asked.width, geometry.head_dim
        if width is None and asked.rank is None and asked.own_rank is None:
            width = even(d + geometry.kv_heads * asked.default)
        if width is not None and width % 2:
            raise LrkvError(
                f"--keys {self.name} caches pairs of numbers, and {width} is odd",
                "see --base-width-k",
            )
        return Shape(d if width is None else width, 0, self.name)

    def cap(self, geometry: Geometry) -> int:
        """No limit: a cached number costs a multiply-add per query head, and there are no residuals
        to go on with.
        """
        return geometry.kv_heads * geometry.head_dim

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        cap = max(2, even(min(cap, geometry.kv_heads * geometry.head_dim)))
        return [Shape(m, 0, self.name) for m in sorted({*range(WIDTH_STEP, cap, WIDTH_STEP), cap})]

    def work(self, shape: Shape, geometry: Geometry) -> int:
        return query_heads(geometry) * shape.width

    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        H, _, d = W.shape
        A, b, scale, sizes, vectors = mixes(W, bias, metric)
        kept = kept_of(sizes, shape.width // 2)
        # latents in the order of frequencies, largest first in each
        pairs = [(j, a) for j, count in enumerate(kept) for a in range(H - 1, H - 1 - count, -1)]
        j, a = (torch.tensor(side, device=W.device) for side in zip(*pairs))
        v = vectors[j, :, a]  # (n, H)
        size = scale.square().mean(0).sqrt()[j]  # latents as large as keys, whatever the metric
        Z = (A[j] @ v.unsqueeze(-1)).squeeze(-1).T / size  # (D, n)
        c = (v.conj() / scale.T[j] * size.unsqueeze(-1)).T  # (H, n)
        tensors = {"W_shared.weight": halves(Z).T, "C": halves(c)}  # (m, D), (H, m)
        if bias is not None:
            tensors["bias"] = halves((b[j] * v).sum(-1) / size)  # (m,)
        heads = torch.zeros(H, len(Z), d // 2, dtype=Z.dtype, device=W.device)
        heads.index_add_(2, j, Z * c.unsqueeze(1))  # (H, D, d / 2)
        error = squared(W.double() - halves(heads), metric)
        total = squared(W.double(), metric)
        relative = (error / total).sqrt().item() if total > 0 else 0.0
        return Fitted(tensors, relative, found={"kept": kept})

    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        """In the metric averaged over rotations, in which the fit is the best there is."""
        sizes = mixes(W, bias, metric)[3].flatten().sort().values
        left = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        return [left[max(0, len(sizes) - shape.width // 2)].item() for shape in shapes]


def mixes(
    W: Tensor, bias: Tensor | None, metric: Metric
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of W (H, D, d) and its bias (H, d) or None, by frequency: A (d/2, D, H) and b (d/2, H)
    complex, both scaled; the scale s (H, d/2); eigenvalues (d/2, H), ascending, and vectors
    (d/2, H, H).
    """
    H, D, d = W.shape
    M = rotation_average(metric.M.root @ metric.M.root, d)
    scale = M.diagonal(dim1=-2, dim2=-1)[:, : d // 2].sqrt()  # (H, d/2)
    scaled = W.double() * torch.cat((scale, scale), dim=-1).unsqueeze(1)  # (H, D, d)
    seen = (metric.sigma @ scaled.transpose(0, 1).flatten(1)).view(D, H, d).transpose(0, 1)
    A, seen = (as_complex(t).permute(2, 1, 0) for t in (scaled, seen))
    b = torch.zeros_like(scale, dtype=A.dtype).T if bias is None else as_complex(bias).T * scale.T
    G = A.mH @ seen + b.conj().unsqueeze(-1) * b.unsqueeze(-2)  # (d/2, H, H)
    sizes, vectors = torch.linalg.eigh((G + G.mH) / 2)
    return A, b, scale, sizes.clamp_min(0), vectors


def kept_of(sizes: Tensor, n: int) -> list[int]:
    """How many latents each frequency keeps, of the n largest of sizes (d/2, H) over all."""
    largest = sizes.flatten().argsort(descending=True, stable=True)[:n]
    return torch.bincount(largest // sizes.shape[1], minlength=len(sizes)).tolist()


def squared(E: Tensor, metric: Metric) -> Tensor:
    """sum_h || Sigma^(1/2) E_h M_h^(1/2) ||_F^2 of E (H, D, d)."""
    E = E @ metric.M.root
    return cast(Tensor, sum((part * (metric.sigma @ part)).sum() for part in E)).clamp_min(0)


def as_complex(t: Tensor) -> Tensor:
    """(..., d) in half-split RoPE layout -> (..., d/2) complex128."""
    return torch.complex(*(half.contiguous() for half in t.double().chunk(2, dim=-1)))


def halves(t: Tensor) -> Tensor:
    """Complex numbers (..., n) as [real parts | imaginary parts] (..., 2 n)."""
    return torch.cat((t.real, t.imag), dim=-1)


def even(number: int) -> int:
    """The next even number at or below."""
    return number // 2 * 2
