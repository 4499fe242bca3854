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

As codes (`TurningHeads`), Sigma is the covariance, and what latents are taken about stays out, with
the bias: means do not turn. A latent is two numbers that rotation mixes, so both have the same
bits. That costs 7 to 28 % more squared error than codes before rotation with bits for each number
(benchmarks/NOTES.md), and nothing is turned when keys are read. Heads may be mixed in groups, which
limits the work of a query head to the latents of its group.

Shapes: H heads, h of them in a group, D width, d head width, n latents, m = 2 n numbers.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.codes import codings
from ..fit.metric import Metric, rotation_average
from .base import WIDTH_STEP, Asked, Fitted, Form, Shape, query_heads, slices
from .channels import at_most, kept_channels, means_of, refuse_residuals
from .rotary import check_whole_heads

TINY = 1e-300  # whose logarithm stands for that of nothing


class Commuting(Form):
    name = runtime = "commuting"
    says = (
        "latents of all heads, one RoPE frequency each: nothing to rebuild, and each query head"
        " reads all of them"
    )
    sized = coded = grouped = True
    rebuilds = False
    turning = "turning"  # its twin where latents are codes

    def check_geometry(self, geometry, base, config):
        check_whole_heads(self.name, geometry)

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """A base one head wide; without any rank of either side as many numbers as halve the
        cache.
        """
        refuse_residuals(self.name, asked)
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
        """Beside codes, each query meets what is not in them, for usual tokens and for sinks."""
        met = query_heads(geometry) * shape.width
        return met + shape.coded * 2 * query_heads(geometry) * geometry.head_dim

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        return 2 + query_heads(geometry) // groups

    def config(self, shapes: Sequence[Shape], base: str) -> dict:
        found = super().config(shapes, base)
        return found | {"form": self.turning} if "codes" in found else found

    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        if shape.coded:
            return self.fit_codes(W, bias, metric, shape)
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

    def fit_codes(self, W: Tensor, bias: Tensor | None, metric: Metric, shape: Shape) -> Fitted:
        """The fit of latents that become codes."""
        assert metric.spread is not None and shape.codes[0] is not None
        groups, beyond, mixed = [], [], []
        for heads in slices(len(W), shape.groups):
            columns, c, gains = turning_latents(W[heads], metric.of(heads))
            kept = kept_channels(columns, gains, shape.codes[0], metric.spread, turn=True)
            # what codes round of the means, in heads: (2, h, d)
            beyond.append(halves(torch.einsum("haj,caj->chj", c, as_complex(kept.beyond))))
            mixed.append(halves(c))
            groups.append((kept, gains.sum().item()))
        means = torch.einsum("cD,hDd->chd", means_of(metric.spread), W.double())
        means = means + torch.cat(beyond, dim=1)
        usual = means[0] if bias is None else means[0] + bias.double()
        tensors = {
            "W_shared.weight": torch.cat([kept.weights.T for kept, _ in groups]),
            "C": torch.stack([kept.sizes for kept, _ in groups]),
            "bias": usual,
            "base_codes.centres": torch.stack([kept.centres for kept, _ in groups], dim=1),
            "base_codes.lift": means[1] - means[0],
            "mix": torch.cat(mixed),
        }
        total = sum(worth for _, worth in groups)
        lost = sum(kept.error**2 * worth for kept, worth in groups)
        bits = [row for kept, _ in groups for row in kept.bits]
        return Fitted(tensors, (lost / total) ** 0.5 if total > 0 else 0.0, found={"bits": bits})

    def coded_curve(
        self,
        W: Tensor,
        metric: Metric,
        widths: Sequence[int],
        geometry: Geometry,
        groups: int = 1,
    ) -> list[tuple[Shape, float]]:
        """All groups have as many latents of each width: what one of these is worth on average."""
        gains = torch.stack(
            [
                turning_latents(W[heads], metric.of(heads))[2]
                .flatten()
                .sort(descending=True)
                .values
                for heads in slices(len(W), groups)
            ]
        ).mean(0)
        return [
            (
                Shape(sum(n for _, n in blocks), 0, self.name, (blocks, None), groups),
                groups * found.loss,
            )
            for found in codings(gains, torch.ones_like(gains), widths)
            if (blocks := at_most(found.blocks, len(gains)))
        ]

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


def turning_latents(W: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of W (H, D, d) as codes want them, in a grid: H rows of d numbers, real parts of all
    frequencies and imaginary ones. Columns (D, H, d), what takes them back to heads c (H, H, d/2)
    complex, by head and row, and what each is worth (H, d), both parts of one the same.

    The mix of heads is best in the metric averaged over rotations, which slow frequencies hardly
    go through: they keep heads apart where that is worth less in their own.
    """
    A, _, scale, _, vectors = mixes(W, None, metric)
    apart = torch.eye(len(W), dtype=vectors.dtype, device=vectors.device).expand_as(vectors)
    found = [_unmixed(A, scale, v, metric) for v in (vectors.flip(-1), apart)]
    bits = [part.clamp_min(TINY).log().sum(1) for _, _, part in found]  # (d/2,)
    mixed = (bits[0] <= bits[1]).view(-1, 1, 1)
    Z, c = (torch.where(mixed, *each) for each in list(zip(*found))[:2])
    worth = torch.where(mixed.squeeze(-1), found[0][2], found[1][2])
    return halves(Z.permute(1, 2, 0)), c.permute(1, 2, 0), torch.cat((worth.T, worth.T), dim=-1)


def _unmixed(A: Tensor, scale: Tensor, v: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """By frequency: latents Z (d/2, D, H) of the mixes v (d/2, H, H), what takes them back to heads
    (d/2, H, H), and what each of their parts is worth after rotation by any angle (d/2, H). A,
    scale: `mixes`.
    """
    assert metric.spread is not None
    covariance = metric.spread.covariance
    size = scale.square().mean(0).sqrt().view(-1, 1, 1)  # latents as large as keys
    Z, c = A @ v / size, v.conj() / scale.T.unsqueeze(-1) * size
    variance = sum((p * (covariance @ p)).sum(1) for p in (Z.real, Z.imag)) / 2
    # noise of 1 in both parts: heads get it in both parts, |c|^2 times
    seen = (scale.square().T.unsqueeze(-1) * c.abs().square()).sum(1)
    return Z, c, (variance * seen).clamp_min(0)


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
