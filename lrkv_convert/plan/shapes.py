"""Widths and ranks per layer, and what they cost: decided before anything is read in full.

Cache per token and layer: (m_K + H r_K) + (m_V + H r_V) numbers instead of 2 H d (arXiv 2601.11471,
Eq 8-9, with m = d in the paper).
"""

from dataclasses import asdict, dataclass

from ..errors import LrkvError
from ..families import Geometry
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
class LayerPlan:
    """Base width m and residual rank r of keys and values of one layer."""

    key_width: int
    key_rank: int
    value_width: int
    value_rank: int


@dataclass(frozen=True)
class Plan:
    """What a conversion will produce. Bytes and flops are per cached token over all layers, bytes
    in the dtype the model is stored in.

    keys: one of KEYS; "full" is planned as width 0 and rank d.
    """

    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    element_size: int
    keys: str = "joint"

    @property
    def bytes_before(self) -> int:
        g = self.geometry
        return 2 * g.layers * g.kv_heads * g.head_dim * self.element_size

    @property
    def bytes_after(self) -> int:
        H = self.geometry.kv_heads
        return self.element_size * sum(
            p.key_width + H * p.key_rank + p.value_width + H * p.value_rank for p in self.layers
        )

    @property
    def ratio(self) -> float:
        return self.bytes_after / self.bytes_before

    @property
    def flops_before(self) -> int:
        """Of one decoding step, per token in the cache: scores and weighted values, two flops per
        multiply-add.
        """
        g = self.geometry
        return 2 * 2 * g.layers * g.kv_heads * g.groups * g.head_dim

    @property
    def flops_after(self) -> int:
        """The same when values and position-free keys are never rebuilt (Eq 6-7: queries and
        outputs are mapped instead, once per step), while keys under RoPE are, once per KV head,
        where they are cached before rotation.
        """
        return 2 * sum(
            self._key_work(p) + self._heads * (p.value_width + p.value_rank) for p in self.layers
        )

    @property
    def _heads(self) -> int:
        return self.geometry.kv_heads * self.geometry.groups

    def _key_work(self, p: LayerPlan) -> int:
        """Multiply-adds to score one cached key of a layer."""
        H, d = self.geometry.kv_heads, self.geometry.head_dim
        if self.keys == "full":
            return self._heads * d
        if not self.geometry.rebuilt:
            return self._heads * (p.key_width + p.key_rank)
        rebuilt = p.key_rank if self.keys == "rotary" else p.key_width + p.key_rank
        return H * rebuilt * d + self._heads * d

    def lrkv_config(self, base: str) -> dict:
        """The `lrkv` field of the converted model's config."""
        side = lambda name, **more: {
            "base_width": [getattr(p, f"{name}_width") for p in self.layers],
            "rank": [getattr(p, f"{name}_rank") for p in self.layers],
            **more,
        }
        return {
            "keys": side("key", alignment=self.key_base(base) not in UNALIGNED, form=self.form),
            "values": side("value", alignment=base not in UNALIGNED),
        }

    def key_base(self, base: str) -> str:
        """How the keys' base is found when that of the values is `base`: one that RoPE passes
        through is the paper's own form.
        """
        return "aligned" if self.keys == "rotary" else base

    @property
    def form(self) -> str:
        """What the modelling code must know of the keys: per-head ones are joint ones without a
        base.
        """
        return "joint" if self.keys == "per-head" else self.keys

    def as_dict(self) -> dict:
        return {
            "geometry": asdict(self.geometry),
            "keys": self.keys,
            "layers": [asdict(p) for p in self.layers],
            "kv_bytes_per_token_before": self.bytes_before,
            "kv_bytes_per_token": self.bytes_after,
            "kv_ratio": self.ratio,
            "kv_flops_per_token_before": self.flops_before,
            "kv_flops_per_token": self.flops_after,
        }


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
    geometry: Geometry,
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
    """The same in every layer. rank_k and rank_v override rank, none at all halves the cache; the
    base is as wide as a head unless width, width_k or width_v say otherwise: 0 is one latent per
    head, a wide base with rank 0 one joint latent for all heads. keys: one of KEYS.

    Raises LrkvError for ranks and widths out of range, and for a cache that does not shrink, unless
    `force`.
    """
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
    plan = Plan(
        geometry, (LayerPlan(*sides["key"], *sides["value"]),) * geometry.layers, element_size, keys
    )
    if plan.ratio >= 1 and not force:
        says = ", ".join(f"{name}s {m} + {H}·{r}" for name, (m, r) in sides.items())
        raise LrkvError(
            f"ranks that give {plan.ratio:.1%} of the original cache ({says} numbers per token)",
            f"with {H} KV heads of width {d} and a base as wide, ranks up to {largest} shrink it;"
            " --force converts anyway",
        )
    return plan
