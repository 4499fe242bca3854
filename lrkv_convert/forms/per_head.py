"""Every head has latents of its own, cached before rotation. Differs from the joint form: no base,
so less is rebuilt when a key under RoPE is read.

Codes of all heads lie in one row (`AxesHeads`), each latent with as many bits as it is worth among
those of all heads: of a budget. Beside `--rank` they are residuals, with a scale for each head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..families import Geometry
from ..fit.metric import Metric
from .base import Asked, Fitted, Shape, first, query_heads, residual_ranks
from .channels import coded_shapes, kept_channels, means_of
from .joint import Joint


class PerHead(Joint):
    name, runtime = "per-head", "joint"  # whose base may be missing
    says = "latents of each head, before rotation: less to rebuild"
    sized = any_base = grouped = False
    row = "axes"  # its twin where codes lie in one row

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """Without a rank, the numbers of a base one head wide are ranks."""
        self.refuse_width(asked.width)
        H, d = geometry.kv_heads, geometry.head_dim
        return Shape(
            0, first(asked.own_rank, asked.rank, min(d, (d + H * asked.default) // H)), self.name
        )

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        return [Shape(0, r, self.name) for r in residual_ranks(geometry.head_dim)]

    def work(self, shape: Shape, geometry: Geometry) -> int:
        """A latent of a row belongs to one head."""
        if not shape.width:
            return super().work(shape, geometry)
        if not geometry.rebuilt:
            return geometry.groups * shape.width
        return (shape.width + query_heads(geometry)) * geometry.head_dim

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        return geometry.head_dim

    def config(self, shapes: Sequence[Shape], base: str) -> dict:
        found = super().config(shapes, base)
        return found | {"form": self.row} if any(shape.width for shape in shapes) else found

    def fit_codes(self, W: Tensor, bias: Tensor | None, metric: Metric, shape: Shape) -> Fitted:
        if shape.codes[0] is None:
            return super().fit_codes(W, bias, metric, shape)
        assert metric.spread is not None
        W = W.double()
        gains, vectors = _principal(W, metric)
        columns = W @ (metric.M.root @ vectors)  # (H, D, d)
        axes = vectors.mT @ metric.M.inverse
        kept = kept_channels(columns.transpose(0, 1), gains, shape.codes[0], metric.spread)
        means = torch.einsum("cD,hDd->chd", means_of(metric.spread), W)
        means = means + (kept.beyond.unsqueeze(2) @ axes).squeeze(2)
        usual = means[0] if bias is None else means[0] + bias.double()
        tensors = kept.tensors(usual, means[1] - means[0]) | {"axes": axes}
        return Fitted(tensors, kept.error, found=kept.found)

    def coded_curve(
        self,
        W: Tensor,
        metric: Metric,
        widths: Sequence[int],
        geometry: Geometry,
        groups: int = 1,
    ) -> list[tuple[Shape, float]]:
        return coded_shapes(_principal(W.double(), metric)[0].flatten(), widths, self.name)


def _principal(W: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Of each head W_h M_h^(1/2): what its principal axes are worth (H, d), and these (H, d, d)."""
    A = W @ metric.M.root
    gains, vectors = torch.linalg.eigh(A.mT @ (metric.sigma @ A))
    return gains.clamp_min(0), vectors
