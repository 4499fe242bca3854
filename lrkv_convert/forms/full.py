"""The keys themselves, after rotation, as the original caches them: width 0 and rank d, without B.
Only values are compressed then.
"""

from collections.abc import Sequence

from torch import Tensor

from ..families import Geometry
from ..fit.metric import Metric
from .base import Asked, Fitted, Form, Shape, query_heads


class Full(Form):
    name = runtime = "full"
    says = "the keys themselves, after rotation, as the original does: only values are compressed"
    rebuilds = False
    budget = 0.75  # keys alone are half of the cache

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        self.refuse_width(asked.width, asked.own_rank)
        return Shape(0, geometry.head_dim, self.name)

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        return [Shape(0, geometry.head_dim, self.name)]

    def work(self, shape: Shape, geometry: Geometry) -> int:
        return query_heads(geometry) * geometry.head_dim

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        return geometry.groups

    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        tensors = {"U.weight": W.transpose(1, 2).flatten(0, 1)}  # (H d, D)
        return Fitted(tensors if bias is None else tensors | {"bias": bias}, 0.0)

    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        return [0.0 for _ in shapes]
