"""Widths and ranks per layer, and what they cost: decided before anything is read in full.

Cache per token and layer: (m_K + H r_K) + (m_V + H r_V) numbers instead of 2 H d (arXiv 2601.11471, Eq 8-9, with m = d in the paper).
"""
from dataclasses import asdict, dataclass

from .adapters import Geometry
from .errors import LrkvError

KEY_SHARE = 0.25        # of all residual rank, when none is given: values need about three times the rank of keys (DESIGN.md section 1)


@dataclass(frozen=True)
class LayerPlan:
    """Base width m and residual rank r of keys and values of one layer."""

    key_width: int
    key_rank: int
    value_width: int
    value_rank: int


@dataclass(frozen=True)
class Plan:
    """What a conversion will produce. Bytes are per token over all layers, in the dtype the model is stored in."""

    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    element_size: int

    @property
    def bytes_before(self) -> int:
        g = self.geometry
        return 2 * g.layers * g.kv_heads * g.head_dim * self.element_size

    @property
    def bytes_after(self) -> int:
        H = self.geometry.kv_heads
        return self.element_size * sum(p.key_width + H * p.key_rank + p.value_width + H * p.value_rank for p in self.layers)

    @property
    def ratio(self) -> float:
        return self.bytes_after / self.bytes_before

    def lrkv_config(self, alignment: bool) -> dict:
        """The `lrkv` field of the converted model's config."""
        side = lambda name: {"base_width": [getattr(p, f"{name}_width") for p in self.layers],
                             "rank": [getattr(p, f"{name}_rank") for p in self.layers], "alignment": alignment}
        return {"keys": side("key"), "values": side("value")}

    def as_dict(self) -> dict:
        return {"geometry": asdict(self.geometry), "layers": [asdict(p) for p in self.layers],
                "kv_bytes_per_token_before": self.bytes_before, "kv_bytes_per_token": self.bytes_after, "kv_ratio": self.ratio}


def halving_ranks(geometry: Geometry) -> tuple[int, int]:
    """Ranks (keys, values) that halve the cache with m = d, keys taking KEY_SHARE of them."""
    both = (geometry.kv_heads - 2) * geometry.head_dim // geometry.kv_heads         # H d numbers left after two bases, in ranks
    key = max(0, round(KEY_SHARE * both))
    return key, max(0, min(both - key, geometry.head_dim))


def uniform_plan(geometry: Geometry, element_size: int, rank: int | None = None, rank_k: int | None = None, rank_v: int | None = None,
                 width: int | None = None, width_k: int | None = None, width_v: int | None = None, force: bool = False) -> Plan:
    """The same in every layer. rank_k and rank_v override rank, none at all halves the cache; the base is as wide as a head unless width,
    width_k or width_v say otherwise: 0 is one latent per head, a wide base with rank 0 one joint latent for all heads.

    Raises LrkvError for ranks and widths out of range, and for a cache that does not shrink, unless `force`.
    """
    default_k, default_v = halving_ranks(geometry) if rank is None else (rank, rank)
    first = lambda *values: next(v for v in values if v is not None)
    d, H = geometry.head_dim, geometry.kv_heads
    sides = {"key": (first(width_k, width, d), first(rank_k, default_k)), "value": (first(width_v, width, d), first(rank_v, default_v))}
    largest = (H - 1) * d // H - (1 if (H - 1) * d % H == 0 else 0)
    for name, (m, r) in sides.items():
        if not 0 <= r <= d:
            raise LrkvError(f"{name} rank {r} is out of range", f"a rank lies between 0 and the head width, {d}; "
                            f"with {H} KV heads, ranks up to {largest} shrink the cache")
        if not 0 <= m <= H * d or m + r == 0:
            raise LrkvError(f"{name} base width {m} with rank {r} is out of range", f"a base is between 0 and {H * d} wide (all heads together), "
                            "and width and rank are not both 0")
    plan = Plan(geometry, (LayerPlan(*sides["key"], *sides["value"]),) * geometry.layers, element_size)
    if plan.ratio >= 1 and not force:
        says = ", ".join(f"{name}s {m} + {H}·{r}" for name, (m, r) in sides.items())
        raise LrkvError(f"ranks that give {plan.ratio:.1%} of the original cache ({says} numbers per token)",
                        f"with {H} KV heads of width {d} and a base as wide, ranks up to {largest} shrink it; --force converts anyway")
    return plan
