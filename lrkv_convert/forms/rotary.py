"""Base after rotation, residual before it. Differs from the joint form: the base is one head wide,
commutes with RoPE (fit/bases.aligned) and lies rotated in the cache, so that it is read as it is
and only residuals are rebuilt.
"""

from collections.abc import Sequence

from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.bases import rotary_error_curve
from ..fit.metric import Metric
from .base import Asked, Shape
from .joint import Joint

# kinds of RoPE whose frequencies change while the cache fills
CHANGING = ("dynamic", "longrope")


class Rotary(Joint):
    name = runtime = "rotary"
    says = (
        "base after rotation, read as it is; residual before, rebuilt: the base must commute with"
        " RoPE"
    )
    sized = any_base = coded = False

    def check_geometry(self, geometry, base, config):
        check_whole_heads(self.name, geometry)
        scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if scaling in CHANGING:
            raise LrkvError(
                f"--keys rotary does not go with {scaling} RoPE, whose frequencies change while the"
                " cache fills",
                "choose another form of keys",
            )

    def base(self, base: str) -> str:
        return "aligned"  # the paper's own form

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        self.refuse_width(asked.width)
        return super().shape(asked, geometry)

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        return self.along(geometry, [geometry.head_dim])

    def work(self, shape: Shape, geometry: Geometry) -> int:
        return self.rebuilding(shape.rank, geometry)

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        """That of its residuals, which are the greater part."""
        return geometry.head_dim

    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        return rotary_error_curve(W, metric, [(shape.width, shape.rank) for shape in shapes])


def check_whole_heads(name: str, geometry: Geometry) -> None:
    """Raise LrkvError where something other than RoPE on whole heads comes between a key's
    projection and its use.
    """
    if not geometry.rotary:
        raise LrkvError(
            f"--keys {name} needs RoPE, and this model has none",
            "its keys are cheap to read as they are: leave --keys out",
        )
    if geometry.key_norm or geometry.rotary_dim < geometry.head_dim:
        raise LrkvError(
            f"--keys {name} needs RoPE on whole heads and keys without a norm",
            "what comes between projection and rotation does not pass through the base; "
            "choose another form of keys",
        )
