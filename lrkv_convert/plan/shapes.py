"""Widths and ranks per layer, and what they cost: decided before anything is read in full.

Cache per token and layer: (m_K + H r_K) + (m_V + H r_V) numbers instead of 2 H d (arXiv 2601.11471,
Eq 8-9, with m = d in the paper).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import LrkvError
from ..families import Geometry, Site
from ..forms import FORMS, Asked, Form, Shape, of_values
from ..modeling.codes_lrkv import check_blocks

# of all residual rank, when none is given: values need about three times the rank of keys
KEY_SHARE = 0.25


@dataclass(frozen=True)
class SitePlan:
    """One attention module of the plan: its layer, its geometry and the shapes of its two sides."""

    layer: int
    geometry: Geometry
    keys: Shape
    values: Shape

    @property
    def sides(self) -> tuple[tuple[Form, Shape, Geometry], ...]:
        """Keys and values: form, shape, and what of the geometry they see."""
        return (
            (FORMS[self.keys.form], self.keys, self.geometry),
            (FORMS[self.values.form], self.values, of_values(self.geometry)),
        )

    @property
    def numbers(self) -> int:
        """Cached per token."""
        return sum(form.numbers(shape, geometry) for form, shape, geometry in self.sides)

    def bytes(self, element_size: int) -> int:
        """The same in bytes."""
        return sum(form.bytes(shape, seen, element_size) for form, shape, seen in self.sides)

    @property
    def numbers_before(self) -> int:
        """Those of the original: 2 H d."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim

    @property
    def work_before(self) -> int:
        """Multiply-adds to score one cached key and to weigh one value."""
        return self.geometry.groups * self.numbers_before

    @property
    def work(self) -> int:
        """The same of the plan."""
        return sum(form.work(shape, geometry) for form, shape, geometry in self.sides)


@dataclass(frozen=True)
class Plan:
    """What a conversion will produce of one kind of attention. Bytes and flops are per cached token
    over all its modules, bytes in the dtype the model is stored in.

    layers: of the stack, those without such attention included; predicted_kl: of a budget, in nats
    (curves.predicted_kl).
    """

    sites: tuple[SitePlan, ...]
    element_size: int
    layers: int
    predicted_kl: float | None = None

    @property
    def bytes_before(self) -> int:
        return self.element_size * sum(site.numbers_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        return sum(site.bytes(self.element_size) for site in self.sites)

    @property
    def ratio(self) -> float:
        return self.bytes_after / self.bytes_before

    @property
    def flops_before(self) -> int:
        """Of one decoding step, per token in the cache: scores and weighted values, two flops per
        multiply-add.
        """
        return 2 * sum(site.work_before for site in self.sites)

    @property
    def flops_after(self) -> int:
        return 2 * sum(site.work for site in self.sites)

    @property
    def geometry(self) -> Geometry:
        """Of the first module, for what all have."""
        return self.sites[0].geometry

    @property
    def keys(self) -> str:
        """The form of keys."""
        return self.sites[0].keys.form

    def lrkv_config(self, base: str) -> dict:
        """The `lrkv` field of the converted model's config: what the form of either side says of
        the layers of the stack.
        """
        at = {site.layer: site for site in self.sites}
        return {
            side: FORMS[getattr(self.sites[0], side).form].config(
                [getattr(at.get(i), side, Shape(0, 0)) for i in range(self.layers)], base
            )
            for side in ("keys", "values")
        }

    def as_dict(self) -> dict:
        return {
            "geometry": asdict(self.geometry),
            "keys": self.keys,
            "layers": [
                {"layer": site.layer, "keys": asdict(site.keys), "values": asdict(site.values)}
                for site in self.sites
            ],
            **self.cache(),
        }

    def cost(self) -> dict:
        """The same, and what is predicted to be lost."""
        return {**self.cache(), "predicted_kl": self.predicted_kl}

    def cache(self) -> dict:
        """Bytes and flops per cached token, before and after."""
        return {
            "kv_bytes_per_token_before": self.bytes_before,
            "kv_bytes_per_token": self.bytes_after,
            "kv_ratio": self.ratio,
            "kv_flops_per_token_before": self.flops_before,
            "kv_flops_per_token": self.flops_after,
        }


def in_codes(side: str, shape: Shape, bits: int | None) -> Shape:
    """A shape with codes of one width. Raises LrkvError for sizes that do not pack."""
    if bits is None:
        return shape
    base, residual = (((bits, size),) if size else None for size in (shape.width, shape.rank))
    try:
        for blocks in (base, residual):
            check_blocks(blocks or (), sum(n for _, n in blocks or ()))
    except ValueError as error:
        raise LrkvError(f"{side}s: {error}", "see --rank and --base-width") from error
    return replace(shape, codes=(base, residual))


def halving_ranks(geometry: Geometry) -> tuple[int, int]:
    """Ranks (keys, values) that halve the cache with m = d, keys taking KEY_SHARE of them."""
    # H d numbers left after two bases, in ranks
    both = (geometry.kv_heads - 2) * geometry.head_dim // geometry.kv_heads
    key = max(0, round(KEY_SHARE * both))
    return key, max(0, min(both - key, geometry.head_dim))


def uniform_plan(
    sites: Sequence[Site],
    layers: int,
    element_size: int,
    rank: int | None = None,
    rank_k: int | None = None,
    rank_v: int | None = None,
    width: int | None = None,
    width_k: int | None = None,
    width_v: int | None = None,
    bits: int | None = None,
    keys: str = "joint",
    force: bool = False,
) -> Plan:
    """The same in every layer. sites: of one kind of attention; layers: of their stack. rank_k and
    rank_v override rank, none at all halves the cache; the base is as wide as a head unless width,
    width_k or width_v say otherwise: 0 is one latent per head, a wide base with rank 0 one joint
    latent for all heads. bits: of each latent, None for 16-bit numbers. keys: the name of their
    form.

    Raises LrkvError for ranks and widths out of range, and for a cache that does not shrink, unless
    `force`.
    """
    geometry = sites[0].geometry
    if rank is rank_k is rank_v is None and not width is width_k is width_v is None:
        raise LrkvError(
            "a base width needs a rank beside it",
            "give --rank, or --rank-k and --rank-v; 0 is one joint latent for all heads",
        )
    default_k, default_v = halving_ranks(geometry)
    shapes = {
        "key": FORMS[keys].shape(
            Asked(width if width_k is None else width_k, rank, rank_k, default_k), geometry
        ),
        "value": FORMS["joint"].shape(
            Asked(width if width_v is None else width_v, rank, rank_v, default_v), geometry
        ),
    }
    d, H = geometry.head_dim, geometry.kv_heads
    largest = (H - 1) * d // H - (1 if (H - 1) * d % H == 0 else 0)
    for name, shape in shapes.items():
        m, r = shape.width, shape.rank
        if not 0 <= r <= d:
            raise LrkvError(
                f"{name} rank {r} is out of range",
                f"a rank lies between 0 and the head width, {d}; "
                f"with {H} KV heads, ranks up to {largest} shrink the cache",
            )
        if not 0 <= m <= H * d or m + r == 0:
            raise LrkvError(
                f"{name} base width {m} with rank {r} is out of range",
                f"a base is between 0 and {H * d} wide (all heads together), "
                "and width and rank are not both 0",
            )
    shapes = {name: in_codes(name, shape, bits) for name, shape in shapes.items()}
    plan = Plan(
        tuple(SitePlan(site.layer, site.geometry, *shapes.values()) for site in sites),
        element_size,
        layers,
    )
    if plan.ratio >= 1 and not force:
        says = ", ".join(f"{name}s {s.width} + {H}·{s.rank}" for name, s in shapes.items())
        raise LrkvError(
            f"ranks that give {plan.ratio:.1%} of the original cache ({says} numbers per token)",
            f"with {H} KV heads of width {d} and a base as wide, ranks up to {largest} shrink it;"
            " --force converts anyway",
        )
    return plan
