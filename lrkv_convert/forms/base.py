"""A form: how one side (keys or values) of an attention module is cached and read.

What a form says here is asked by the planner, the fit and the options; what a converted model does
with it is its twin in modeling/forms_lrkv.py, under the name `Form.runtime`. A new form is a file
here, a class there, and a row in the registry of either.

Shapes: H KV heads, G query heads per KV head, D width, d head width, m base width, r rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.bases import UNALIGNED, check_shape
from ..fit.metric import Metric
from ..modeling.codes_lrkv import Blocks, row_bytes

WIDTH_STEP = 16  # base widths of a budget: what tensor cores take as an inner dimension
RANK_STEP = 4  # its residual ranks


@dataclass(frozen=True)
class Shape:
    """How much of one side of one attention module is cached: base width m and residual rank r, in
    the form of this name; codes: of base and of residual, None for 16-bit numbers
    (modeling/codes_lrkv.py); groups: of heads that share a base m wide.
    """

    width: int
    rank: int
    form: str = "joint"
    codes: tuple[Blocks | None, Blocks | None] = (None, None)
    groups: int = 1

    @property
    def coded(self) -> bool:
        return any(blocks is not None for blocks in self.codes)


@dataclass(frozen=True)
class Asked:
    """What a user asks of one side in every layer; None where nothing was said.

    width, rank: of this side, or of both sides alike; own_rank: of this side alone; default: the
    rank that halves the cache with a base one head wide.
    """

    width: int | None
    rank: int | None
    own_rank: int | None
    default: int


@dataclass(frozen=True)
class Fitted:
    """One side of one attention module after its fit.

    tensors: of its module in the converted model, by their names there; error: relative, in the
    metric of the fit; gauge (H, d, d) or None: the true head is What_h gauge_h, and the partner
    (W_Q or W_O) is to absorb gauge_h; found: what the config of the converted model is to say of
    this layer beside its shape, as JSON has it, by the names of attributes of the module.
    """

    tensors: dict[str, Tensor]
    error: float
    gauge: Tensor | None = None
    found: dict = field(default_factory=dict)


class Form(ABC):
    """A form of keys or values. Subclasses say how it is fitted, what it costs and what it cannot
    do.
    """

    name: str  # as `--keys` takes it
    says: str  # a line for help and documentation
    runtime: str  # its twin's name, modeling/forms_lrkv.py
    budget = 0.5  # share of the original cache when none is asked for
    sized = False  # whether a user may say how wide its base is
    any_base = False  # whether it goes with bases other than the joint one
    coded = False  # whether what it caches may be codes
    coded_only = False  # whether it must be
    grouped = False  # whether groups of heads may have bases of their own, of codes
    rebuilds = True  # whether a key under RoPE is put together before it is met

    def check(self, geometries: Iterable[Geometry], base: str, config) -> None:
        """Raise LrkvError where it does not go with the base or would not be exact."""
        if base != "joint" and not self.any_base:
            raise LrkvError(
                f"--keys {self.name} goes with the joint base only, not {base}",
                "leave --base out",
            )
        for geometry in geometries:
            self.check_geometry(geometry, base, config)

    def check_geometry(  # noqa: B027  (most refuse nothing)
        self, geometry: Geometry, base: str, config
    ) -> None:
        """The same of one attention module."""

    def check_shape(self, shape: Shape, geometry: Geometry, base: str) -> None:
        """Raise ValueError for a shape that it cannot have."""
        check_shape(self.base(base), geometry.kv_heads, geometry.head_dim, shape.width, shape.rank)

    def base(self, base: str) -> str:
        """How its base is found (fit/bases.py) when `base` is asked for."""
        return base

    @abstractmethod
    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """Its shape when every layer is to have the same. Raises LrkvError."""

    def refuse_width(self, *sizes: int | None) -> None:
        """Raise LrkvError if any is given: the form knows its own."""
        if any(size is not None for size in sizes):
            raise LrkvError(
                f"--keys {self.name} says already how wide keys are",
                "leave --base-width-k out, and with full keys --rank-k",
            )

    @abstractmethod
    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        """Shapes along the path of a budget, never more than the original caches. cap: the widest
        base.
        """

    def cap(self, geometry: Geometry) -> int:
        """How wide its base may become in a budget when nothing else is asked for. A cached number
        of a key under RoPE or QK-norm is read back at d multiply-adds per head (the key is rebuilt
        before it is rotated), that of a value or a position-free key at one: the former stop at one
        head's width, the others at four.
        """
        return geometry.head_dim if geometry.rebuilt else 4 * geometry.head_dim

    def numbers(self, shape: Shape, geometry: Geometry) -> int:
        """Cached per token: g m + H r."""
        return shape.groups * shape.width + geometry.kv_heads * shape.rank

    def bytes(self, shape: Shape, geometry: Geometry, element_size: int) -> int:
        """The same in bytes. element_size: of the dtype that the model is stored in."""
        base, residual = shape.codes
        shared = element_size * shape.width if base is None else row_bytes(base)
        own = element_size * shape.rank if residual is None else row_bytes(residual)
        return shape.groups * shared + geometry.kv_heads * own

    @abstractmethod
    def work(self, shape: Shape, geometry: Geometry) -> int:
        """Multiply-adds to read one cached token, all query heads together."""

    @abstractmethod
    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        """Multiply-adds for each cached number of a key under RoPE, all query heads together: what
        `--work` limits.
        """

    @abstractmethod
    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        """Fit W (H, D, d) and its bias (H, d) in this shape."""

    @abstractmethod
    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        """Squared error of the fit, absolute, at each shape."""

    def coded_curve(
        self,
        W: Tensor,
        metric: Metric,
        widths: Sequence[int],
        geometry: Geometry,
        groups: int = 1,
    ) -> list[tuple[Shape, float]]:
        """Shapes whose latents are codes of these widths, and the loss of each, absolute, as
        `curve` gives it. Only of forms that are `coded`; more groups than one only where they are
        `grouped`.
        """
        raise NotImplementedError(self.name)

    def config(self, shapes: Sequence[Shape], base: str) -> dict:
        """What the converted model must know: an entry per layer, 0 and 0 where a layer has no such
        attention.
        """
        codes, groups = [plain(shape.codes) for shape in shapes], [s.groups for s in shapes]
        return {
            "base_width": [shape.width for shape in shapes],
            "rank": [shape.rank for shape in shapes],
            "alignment": self.base(base) not in UNALIGNED,
            "form": self.runtime,
            **({"codes": codes} if any(shape.coded for shape in shapes) else {}),
            **({"groups": groups} if any(count > 1 for count in groups) else {}),
        }


def plain(codes: Sequence[Blocks | None]) -> list[list[list[int]] | None]:
    """Codes of the slots of a side as JSON has them."""
    return [None if blocks is None else [list(pair) for pair in blocks] for blocks in codes]


def residual_ranks(head_dim: int) -> range:
    """Ranks that a budget tries."""
    return range(RANK_STEP, head_dim + 1, max(RANK_STEP, head_dim // 16 // RANK_STEP * RANK_STEP))


def group_count(geometry: Geometry, size: int | None) -> int:
    """How many groups of so many heads there are; None, or more than there are: one of all."""
    return 1 if size is None else max(1, geometry.kv_heads // size)


def slices(heads: int, groups: int) -> list[slice]:
    """The heads of each group."""
    step = heads // groups
    return [slice(i, i + step) for i in range(0, heads, step)]


def query_heads(geometry: Geometry) -> int:
    """H G"""
    return geometry.kv_heads * geometry.groups


def of_values(geometry: Geometry) -> Geometry:
    """The geometry that values see: nothing turns or normalises them."""
    return replace(geometry, rotary_dim=0, key_norm=False)


def first(*values: int | None) -> int:
    """The first that is given."""
    return next(value for value in values if value is not None)
