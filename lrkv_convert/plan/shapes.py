"""Widths and ranks per layer, and what they cost: decided before anything is read in full.

Cache per token and layer: (m_K + H r_K) + (m_V + H r_V) numbers instead of 2 H d (arXiv 2601.11471,
Eq 8-9, with m = d in the paper).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import LrkvError
from ..families import Geometry, Site
from ..fit.bases import UNALIGNED

# of all residual rank, when none is given: values need about three times the rank of keys
KEY_SHARE = 0.25


# How RoPE keys are cached: quality, bytes and the work of reading one back differ
KEYS = {
    "joint": (
        "base and residual before rotation, rebuilt and rotated when read: the best quality per"
        " byte"
    ),
    "per-head": "residual only, before rotation: less to rebuild",
    "rotary": (
        "base after rotation, read as it is; residual before, rebuilt: the base must commute with"
        " RoPE"
    ),
    "full": "the keys themselves, after rotation, as the original does: only values are compressed",
}


@dataclass(frozen=True)
class Shape:
    """How one side (keys or values) of one attention module is cached: base width m and residual
    rank r, in one of KEYS; "full" is width 0 and rank d.
    """

    width: int
    rank: int
    form: str = "joint"

    def numbers(self, geometry: Geometry) -> int:
        """Cached per token: m + H r."""
        return self.width + geometry.kv_heads * self.rank


@dataclass(frozen=True)
class SitePlan:
    """One attention module of the plan: its layer, its geometry and the shapes of its two sides."""

    layer: int
    geometry: Geometry
    keys: Shape
    values: Shape

    @property
    def numbers(self) -> int:
        """Cached per token."""
        return self.keys.numbers(self.geometry) + self.values.numbers(self.geometry)

    @property
    def numbers_before(self) -> int:
        """The same of the original: 2 H d."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim

    @property
    def work_before(self) -> int:
        """Multiply-adds to score one cached key and to weigh one value."""
        return 2 * self._heads * self.geometry.head_dim

    @property
    def work(self) -> int:
        """The same when values and position-free keys are never rebuilt (Eq 6-7: queries and
        outputs are mapped instead, once per step), while keys under RoPE are, once per KV head,
        where they are cached before rotation.
        """
        return self._key_work + self._heads * (self.values.width + self.values.rank)

    @property
    def _heads(self) -> int:
        return self.geometry.kv_heads * self.geometry.groups

    @property
    def _key_work(self) -> int:
        """Multiply-adds to score one cached key."""
        H, d, shape = self.geometry.kv_heads, self.geometry.head_dim, self.keys
        if shape.form == "full":
            return self._heads * d
        if not self.geometry.rebuilt:
            return self._heads * (shape.width + shape.rank)
        rebuilt = shape.rank if shape.form == "rotary" else shape.width + shape.rank
        return H * rebuilt * d + self._heads * d


@dataclass(frozen=True)
class Plan:
    """What a conversion will produce of one kind of attention. Bytes and flops are per cached token
    over all its modules, bytes in the dtype the model is stored in.

    layers: of the stack, those without such attention included.
    """

    sites: tuple[SitePlan, ...]
    element_size: int
    layers: int

    @property
    def bytes_before(self) -> int:
        return self.element_size * sum(site.numbers_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        return self.element_size * sum(site.numbers for site in self.sites)

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
        """The `lrkv` field of the converted model's config: lists have an entry per layer, 0 and 0
        where a layer has no such attention.
        """
        at = {site.layer: site for site in self.sites}

        def side(name: str, **more) -> dict:
            shapes = [getattr(at.get(i), name, Shape(0, 0)) for i in range(self.layers)]
            return {
                "base_width": [shape.width for shape in shapes],
                "rank": [shape.rank for shape in shapes],
                **more,
            }

        form = "joint" if self.keys == "per-head" else self.keys  # which is joint without a base
        return {
            "keys": side("keys", alignment=key_base(self.keys, base) not in UNALIGNED, form=form),
            "values": side("values", alignment=base not in UNALIGNED),
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

    def cache(self) -> dict:
        """Bytes and flops per cached token, before and after."""
        return {
            "kv_bytes_per_token_before": self.bytes_before,
            "kv_bytes_per_token": self.bytes_after,
            "kv_ratio": self.ratio,
            "kv_flops_per_token_before": self.flops_before,
            "kv_flops_per_token": self.flops_after,
        }


def key_base(form: str, base: str) -> str:
    """How the base of keys in this form is found when that of the values is `base`: one that RoPE
    passes through is the paper's own form.
    """
    return "aligned" if form == "rotary" else base


def check_keys(keys: str, base: str, geometry: Geometry, config) -> None:
    """Raise LrkvError for a form of keys that does not exist, does not go with the base, or would
    not be exact.
    """
    if keys not in KEYS:
        raise LrkvError(f"unknown form of keys {keys!r}", f"choose from {', '.join(KEYS)}")
    if keys != "joint" and base != "joint":
        raise LrkvError(
            f"--keys {keys} goes with the joint base only, not {base}", "leave --base out"
        )
    if keys == "rotary" and not geometry.rotary:
        raise LrkvError(
            "--keys rotary needs RoPE, and this model has none",
            "its keys are cheap to read as they are: leave --keys out",
        )
    if keys == "rotary" and (geometry.key_norm or geometry.rotary_dim < geometry.head_dim):
        raise LrkvError(
            "--keys rotary needs RoPE on whole heads and keys without a norm",
            "what comes between projection and rotation does not pass through the base; "
            "choose another form of keys",
        )
    if base == "aligned" and (geometry.key_norm or 0 < geometry.rotary_dim < geometry.head_dim):
        raise LrkvError(
            "the aligned base does not go with QK-norm, nor with RoPE on a part of each head",
            "nothing may pass between queries and keys there; leave --base out",
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if keys == "rotary" and scaling in ("dynamic", "longrope"):
        raise LrkvError(
            f"--keys rotary does not go with {scaling} RoPE, whose frequencies change while the"
            " cache fills",
            "choose another form of keys",
        )


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
    keys: str = "joint",
    force: bool = False,
) -> Plan:
    """The same in every layer. sites: of one kind of attention; layers: of their stack. rank_k and
    rank_v override rank, none at all halves the cache; the base is as wide as a head unless width,
    width_k or width_v say otherwise: 0 is one latent per head, a wide base with rank 0 one joint
    latent for all heads. keys: one of KEYS.

    Raises LrkvError for ranks and widths out of range, and for a cache that does not shrink, unless
    `force`.
    """
    geometry = sites[0].geometry
    if rank is rank_k is rank_v is None and not width is width_k is width_v is None:
        raise LrkvError(
            "a base width needs a rank beside it",
            "give --rank, or --rank-k and --rank-v; 0 is one joint latent for all heads",
        )
    default_k, default_v = halving_ranks(geometry) if rank is None else (rank, rank)
    first = lambda *values: next(v for v in values if v is not None)
    d, H = geometry.head_dim, geometry.kv_heads
    if (
        keys != "joint"
        and (width, width_k) != (None, None)
        or keys == "full"
        and rank_k is not None
    ):
        raise LrkvError(
            f"--keys {keys} says already how wide keys are",
            "leave --base-width-k out, and with full keys --rank-k",
        )
    if keys == "full":
        width_k, rank_k = 0, d
    elif keys == "per-head":  # the numbers of a base one head wide, as ranks
        width_k, default_k = 0, min(d, (d + H * default_k) // H) if rank is None else rank
    sides = {
        "key": (first(width_k, width, d), first(rank_k, default_k)),
        "value": (first(width_v, width, d), first(rank_v, default_v)),
    }
    largest = (H - 1) * d // H - (1 if (H - 1) * d % H == 0 else 0)
    for name, (m, r) in sides.items():
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
    shapes = Shape(*sides["key"], keys), Shape(*sides["value"])
    plan = Plan(
        tuple(SitePlan(site.layer, site.geometry, *shapes) for site in sites), element_size, layers
    )
    if plan.ratio >= 1 and not force:
        says = ", ".join(f"{name}s {m} + {H}·{r}" for name, (m, r) in sides.items())
        raise LrkvError(
            f"ranks that give {plan.ratio:.1%} of the original cache ({says} numbers per token)",
            f"with {H} KV heads of width {d} and a base as wide, ranks up to {largest} shrink it;"
            " --force converts anyway",
        )
    return plan
