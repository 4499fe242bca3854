"""Spend a byte budget: base widths and ranks per layer, for keys and values apart.

Each side of each layer is a curve: numbers cached per token -> predicted loss. Along it the base
widens first (at equal bytes a wider base is never worse in the fitted metric) up to a cap, then
residual ranks grow. Segments of the curves' lower convex hulls are bought in the order of loss
removed per number, which is optimal for convex curves; what is left of the budget buys the best
smaller steps that still fit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import LrkvError
from ..families import Geometry, Site
from ..forms import FORMS, Shape
from ..modeling.codes_lrkv import Blocks
from .shapes import Plan, SitePlan


@dataclass(frozen=True)
class Point:
    """One choice for one side of a layer: base width m, rank r, what a token takes (numbers, or
    bytes where latents are codes), predicted loss, the codes of the base, or of the residuals where
    there is no base, and the groups of heads that share one.
    """

    width: int
    rank: int
    size: int
    loss: float
    codes: Blocks | None = None
    groups: int = 1

    def shape(self, form: str) -> Shape:
        """In the form of this name."""
        return Shape(
            self.width,
            self.rank,
            form,
            (self.codes, None) if self.width else (None, self.codes),
            self.groups,
        )


Curve = list[Point]
Caps = Callable[[Geometry], tuple[int, int]]  # the widest bases of keys and values


def check_floor(sites: Sequence[Site], caps: Caps, keys: str, cache_ratio: float) -> None:
    """Raise LrkvError for a budget below the smallest plan there is. sites: of one kind of
    attention; caps: the widest bases of keys and values of a geometry (curves.width_caps).
    """
    smallest = before = 0
    for geometry in (site.geometry for site in sites):
        for cap, form in zip(caps(geometry), (FORMS[keys], FORMS["joint"])):
            shapes = form.candidates(geometry, cap)
            smallest += min(form.numbers(shape, geometry) for shape in shapes)
        before += 2 * geometry.kv_heads * geometry.head_dim
    if smallest > cache_ratio * before:
        raise LrkvError(
            f"a cache ratio of {cache_ratio} is below the smallest plan",
            f"the floor of this model is {smallest / before:.3f}",
        )


def hull(curve: Curve) -> Curve:
    """The lower convex hull of a curve, by numbers: the points worth stopping at."""
    kept: Curve = []
    for point in sorted(curve, key=lambda p: (p.size, p.loss)):
        if kept and point.loss >= kept[-1].loss:
            continue  # costs more and is no better
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], point):
            kept.pop()
        kept.append(point)
    return kept


def _gain(a: Point, b: Point) -> float:
    """Loss removed per number, or byte, from a to b."""
    return (a.loss - b.loss) / (b.size - a.size)


def allocate(
    curves: Iterable[tuple[Curve, Curve]],
    sites: Sequence[Site],
    layers: int,
    element_size: int,
    cache_ratio: float,
    keys: str = "joint",
) -> Plan:
    """Plan widths and ranks from the (keys, values) curves of every site of one kind of attention
    so that the cache is at most `cache_ratio` of the original. layers: of their stack.

    Raises LrkvError for a budget below the smallest plan.
    """
    sides = [hull(curve) for pair in curves for curve in pair]
    unit = element_size if any(point.codes for side in sides for point in side) else 1
    before = unit * sum(2 * site.geometry.kv_heads * site.geometry.head_dim for site in sites)
    alike = Counter((site.geometry.kv_heads, site.geometry.head_dim) for site in sites)
    budget = unit * int(sum(cache_ratio * 2 * count * H * d for (H, d), count in alike.items()))
    chosen = [0] * len(sides)
    spent = sum(curve[0].size for curve in sides)
    if spent > budget:
        floor = spent / before
        raise LrkvError(
            f"a cache ratio of {cache_ratio} is below the smallest plan",
            f"the floor of this model is {floor:.3f}",
        )
    open_sides = set(range(len(sides)))
    while open_sides:
        best, step = None, 0
        for i in list(open_sides):
            if chosen[i] + 1 == len(sides[i]):
                open_sides.discard(i)
                continue
            here, following = sides[i][chosen[i]], sides[i][chosen[i] + 1]
            if spent + following.size - here.size > budget:
                open_sides.discard(i)
            elif best is None or _gain(here, following) > best:
                best, step = _gain(here, following), i
        if best is not None:
            spent += sides[step][chosen[step] + 1].size - sides[step][chosen[step]].size
            chosen[step] += 1
    picked = [curve[c] for curve, c in zip(sides, chosen)]
    planned = (
        SitePlan(
            site.layer,
            site.geometry,
            k.shape(keys),
            v.shape("joint"),
        )
        for site, k, v in zip(sites, picked[::2], picked[1::2], strict=True)
    )
    return Plan(tuple(planned), element_size, layers)
