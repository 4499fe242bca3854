"""The families: the only place that knows tensor names and layouts. `adapter_for` looks a config's
model_type up in the dict below.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry
from .encoder_decoder import ENCODER_DECODERS, KINDS, EncoderDecoder
from .rows import FAMILIES

ADAPTERS: dict[str, Adapter] = {adapter.model_type: adapter for adapter in FAMILIES}

__all__ = [
    "ADAPTERS",
    "ENCODER_DECODERS",
    "KINDS",
    "Adapter",
    "AttentionWeights",
    "EncoderDecoder",
    "Geometry",
    "adapter_for",
    "family_with_encoder",
]


def adapter_for(config) -> Adapter:
    """The adapter of a model's family. Raises LrkvError for unsupported families (naming the
    nearest), variants, and a single KV head.
    """
    if config.model_type in ENCODER_DECODERS:
        raise LrkvError(
            f"{config.model_type} is an encoder-decoder, which this command does not handle",
            "lrkv convert and lrkv compare do",
        )
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None:
        near = difflib.get_close_matches(
            config.model_type, [*ADAPTERS, *ENCODER_DECODERS], n=1, cutoff=0.0
        )[0]
        raise LrkvError(
            f"the family {config.model_type!r} is not supported",
            f"nearest supported: {near}; all: {', '.join(sorted([*ADAPTERS, *ENCODER_DECODERS]))}",
        )
    with _sensible(config):
        adapter.refuse(config)
        geometry = adapter.geometry(config)
    check_heads(geometry, config.num_attention_heads)
    if geometry.kv_heads == 1:
        raise LrkvError(
            "this model has one KV head (multi-query attention)",
            "there is nothing to share; LRKV needs at least two KV heads",
        )
    return adapter


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


def family_with_encoder(config) -> EncoderDecoder | None:
    """The family of a model that has an encoder, None for decoder-only ones. Raises LrkvError for
    variants.
    """
    family = ENCODER_DECODERS.get(config.model_type.removeprefix("lrkv_"))
    if family is not None:
        with _sensible(config):
            family.refuse(config)
    return family


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
