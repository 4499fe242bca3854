"""The families: the only place that knows tensor names and layouts. `family_of` looks a config's
model_type up in the dict below.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LrkvError
from .base import (
    KINDS,
    Adapter,
    AttentionWeights,
    Encoder,
    Family,
    Geometry,
    Site,
    by_kind,
)
from .encoder_decoder import ENCODER_DECODERS
from .rows import DECODERS

CONVERTED = "lrkv_"  # before the model_type of what this project wrote
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (*(Family({"self": adapter}) for adapter in DECODERS), *ENCODER_DECODERS)
}

__all__ = [
    "CONVERTED",
    "FAMILIES",
    "KINDS",
    "Adapter",
    "AttentionWeights",
    "Encoder",
    "Family",
    "Geometry",
    "Site",
    "by_kind",
    "family_named",
    "family_of",
]


def family_named(model_type: str) -> Family | None:
    """The family of an original or a converted model; None for one this package does not know."""
    return FAMILIES.get(model_type.removeprefix(CONVERTED))


def family_of(config) -> Family:
    """The family of a model that is to be converted. Raises LrkvError for unsupported families
    (naming the nearest), variants, and a single KV head.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        near = difflib.get_close_matches(config.model_type, FAMILIES, n=1, cutoff=0.0)[0]
        raise LrkvError(
            f"the family {config.model_type!r} is not supported",
            f"nearest supported: {near}; all: {', '.join(sorted(FAMILIES))}",
        )
    with _sensible(config):
        family.refuse(config)
        geometries = {adapter.geometry(config) for adapter in family.kinds.values()}
    for geometry in geometries:
        if family.encoder is None:
            check_heads(geometry, config.num_attention_heads)
        if geometry.kv_heads == 1:
            what, least = (
                ("one KV head (multi-query attention)", "two KV heads")
                if family.encoder is None
                else ("one attention head", "two")
            )
            raise LrkvError(
                f"this model has {what}", f"there is nothing to share; LRKV needs at least {least}"
            )
    return family


def check_heads(g: Geometry, heads: int) -> None:
    """Raise LrkvError for heads that no attention has. transformers builds such a model, whose
    weights may even fit the config, and fails where it is run.
    """
    if g.kv_heads * g.groups != heads or min(g.width, g.kv_heads, g.groups, g.head_dim) < 1:
        raise LrkvError(
            f"the config asks for {heads} heads of width {g.head_dim} on {g.kv_heads} KV heads, "
            f"in a model {g.width} wide: each KV head serves the same number of heads",
            "is config.json that of these weights?",
        )
    if g.rotary_dim % 2 or g.rotary_dim > g.head_dim:
        raise LrkvError(
            f"the config has RoPE turn {g.rotary_dim} channels of heads {g.head_dim} wide: it turns"
            " pairs of a head's own",
            "is config.json that of these weights?",
        )


@contextmanager
def _sensible(config) -> Iterator[None]:
    """Raise LrkvError for fields of a config of which no shapes can be made: no heads, a text for a
    number.
    """
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        raise LrkvError(
            f"the config of this {config.model_type} gives no shapes of attention:"
            f" {type(error).__name__}: {error}",
            "is config.json whole?",
        ) from error
