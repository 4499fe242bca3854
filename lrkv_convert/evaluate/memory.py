"""Bytes a model caches: by the formula, and counted on the tensors of a live cache."""

from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..families import Site, by_kind, family_named
from ..folder.companions import FIELDS
from ..modeling.codes_lrkv import row_bytes

# where transformers' cache layers keep what they hold
HELD = ("keys", "values", "_quantized_keys", "_quantized_values")


def by_attention(cache: Cache) -> dict[str, Cache]:
    """The cache of each kind of attention."""
    if isinstance(cache, EncoderDecoderCache):
        return {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"self": cache}


def cache_bytes(cache: Cache) -> int:
    """Bytes of the live tensors of a cache, quantised ones with their scales."""
    return sum(bytes_by_kind(cache).values())


def bytes_by_kind(cache: Cache) -> dict[str, int]:
    """The same of each kind of attention."""
    return {kind: _layer_bytes(part) for kind, part in by_attention(cache).items()}


def _layer_bytes(cache: Cache) -> int:
    layers: list[Any] = cache.layers
    return sum(
        _bytes(getattr(layer, name, None))
        for layer in layers
        if layer.is_initialized
        for name in HELD
    )


def _bytes(held) -> int:
    """Of a tensor, of the tensors inside a quantised one, or of those in a tuple, list or dict."""
    if isinstance(held, torch.Tensor) and (inside := getattr(held, "__tensor_flatten__", None)):
        return sum(_bytes(getattr(held, name)) for name in inside()[0])
    if isinstance(held, torch.Tensor):
        return held.numel() * held.element_size()
    if isinstance(held, (tuple, list, dict)):
        return sum(map(_bytes, held.values() if isinstance(held, dict) else held))
    return 0


def formula_bytes(config, element_size: int) -> int | None:
    """sum over modules of self-attention of (m_K + H r_K + m_V + H r_V), or 2 H d each for an
    original (arXiv 2601.11471, Eq 8), times the element size; of codes the bytes of their rows.
    None for a family this package does not know.
    """
    found = formula_bytes_by_kind(config, element_size)
    return None if found is None else found["self"]


def formula_bytes_by_kind(config, element_size: int) -> dict[str, int] | None:
    """The same of each kind of attention: of self-attention per token of the decoder, of
    cross-attention per position of the encoder.
    """
    family = family_named(config.model_type)
    if family is None:
        return None
    return {
        kind: _bytes_of(sites, getattr(config, FIELDS[kind], None), element_size)
        for kind, sites in by_kind(family.sites(config)).items()
    }


def _bytes_of(sites: list[Site], spec: dict | None, element_size: int) -> int:
    if spec is None:
        return element_size * sum(
            2 * site.geometry.kv_heads * site.geometry.head_dim for site in sites
        )
    total = 0
    for site in sites:
        for side in (spec["keys"], spec["values"]):
            sizes = side["base_width"][site.layer], side["rank"][site.layer]
            codes = side["codes"][site.layer] if "codes" in side else (None, None)
            groups = side["groups"][site.layer] if "groups" in side else 1
            times = groups, site.geometry.kv_heads
            for heads, size, blocks in zip(times, sizes, codes, strict=True):
                total += heads * (element_size * size if blocks is None else row_bytes(blocks))
    return total
