"""Residuals alone: every head has its own latent, cached before rotation. Differs from the joint
form: no base, so less is rebuilt when a key under RoPE is read.
"""

from ..families import Geometry
from .base import Asked, Shape, first, residual_ranks
from .joint import Joint


class PerHead(Joint):
    name, runtime = "per-head", "joint"  # whose base may be missing
    says = "residual only, before rotation: less to rebuild"
    sized = any_base = coded = False

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """Without a rank, the numbers of a base one head wide are ranks."""
        self.refuse_width(asked.width)
        H, d = geometry.kv_heads, geometry.head_dim
        return Shape(
            0, first(asked.own_rank, asked.rank, min(d, (d + H * asked.default) // H)), self.name
        )

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        return [Shape(0, r, self.name) for r in residual_ranks(geometry.head_dim)]
