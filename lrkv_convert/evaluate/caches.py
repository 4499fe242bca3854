"""Quantised caches of transformers, as rows of a comparison: what people use today to halve a
cache, alone and on top of LRKV.

A quantised cache gives the first tokens it is handed back as they were, so a window must be read in
pieces for its error to be seen: PIECE tokens at a time are attended to as they are (integers; FP8
rounds at once) and all before them as the cache kept them, which is what decoding with a residual
window of that length does.
"""

import copy
import math
from typing import Any

from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache

from ..errors import LrkvError, first_line
from ..families import family_named

# transformers' default for its residual window. All that came before is quantised anew with every
# piece: shorter ones cost more
PIECE = 128
# numbers that share a scale; what does not divide a head's width is lowered to what does
GROUP = 64

# name -> arguments of QuantizedCache. axis 1: scales per token, as for values in KIVI (Liu et al.
# 2024); per channel would need more tokens at once.
# FP8 has one scale for all, taken from the first tokens it sees
CACHES = {
    "fp8": {"backend": "fp8"},
    **{
        f"int{bits}": {
            "backend": "hqq",
            "nbits": bits,
            "axis_key": 1,
            "axis_value": 1,
            "q_group_size": GROUP,
            "residual_length": PIECE,
        }
        for bits in (8, 4, 2)
    },
}


def new_cache(model: PreTrainedModel, kind: str | None = None) -> Cache:
    """An empty cache for `model`: transformers' own dynamic one or, of a decoder on its own, one of
    CACHES. Raises LrkvError where it cannot be made.
    """
    if kind is None and model.config.is_encoder_decoder:
        # of as many layers as it takes: a config gives the encoder's number
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if kind is None:
        return DynamicCache(config=model.config)
    check_caches([kind])
    try:
        cache = QuantizedCache(config=model.config, **CACHES[kind])
    except ImportError as error:
        raise LrkvError(
            f"the {kind} cache needs a package that is not installed: {first_line(error)}",
            "pip install 'lrkv-convert[quant]'",
        ) from error
    # an older transformers, or layers that a quantised cache does not take
    except ValueError as error:
        raise LrkvError(
            f"transformers has no {kind} cache for this model: {first_line(error)}",
            "leave it out of --cache",
        ) from error
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "q_group_size"):
            layer.q_group_size = math.gcd(GROUP, head_width(model.config))
    return cache


def static_cache(model: PreTrainedModel, tokens: int, positions: int) -> Cache:
    """An empty static cache for so many tokens of the decoder and, of an encoder-decoder, so many
    positions of the encoder.
    """
    if not model.config.is_encoder_decoder:
        return StaticCache(config=model.config, max_cache_len=tokens)
    config, family = copy.deepcopy(model.config), family_named(model.config.model_type)
    assert family is not None, "no other encoder-decoder is loaded"
    # where a config knows one number of layers alone, it is the encoder's
    config.num_hidden_layers = family.layers(config)
    return EncoderDecoderCache(
        *(StaticCache(config=config, max_cache_len=length) for length in (tokens, positions))
    )


def check_caches(kinds: list[str]) -> None:
    """Raise LrkvError for a name that is none of CACHES."""
    if unknown := [kind for kind in kinds if kind not in CACHES]:
        raise LrkvError(f"unknown cache {unknown[0]!r}", f"choose from {', '.join(CACHES)}")


def head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
