"""Where factored keys and values lie: two layers of a transformers cache per attention layer, bases apart from residuals. Travels with every
converted checkpoint."""
import copy

import torch
from transformers.cache_utils import Cache


def with_residual_layers(cache: Cache | None, num_layers: int) -> Cache | None:
    """Give a transformers cache two cache layers per attention layer: bases in layers [0, L), residuals in [L, 2 L).

    The two must be apart (the residual is head-major, the base has one head), and standard cache layers keep every transformers cache
    (dynamic, static, sliding, offloaded, quantised) usable as it is. The second half copies the still empty first half.
    """
    if cache is not None and len(cache.layers) == num_layers and cache.layer_class_to_replicate is None:
        if any(layer.is_initialized for layer in cache.layers):
            raise ValueError("this cache was filled by another model: an LRKV model needs one of its own")
        cache.layers.extend(copy.deepcopy(layer) for layer in cache.layers[:num_layers])
    return cache


def update_cache(cache: Cache, layer_idx: int, num_layers: int, keys: tuple, values: tuple) -> tuple[tuple, tuple]:
    """Append this step's (base, residual) of keys and values; return those of all cached tokens.

    Cache layers look at their first tensor for the length, so an empty one (m = 0 or r = 0) never stands first, and a pair of two empty
    ones takes no layer at all.
    """
    pairs = [list(pair) for pair in zip(keys, values)]                          # [[base K, base V], [residual K, residual V]]
    filled = [i for i, pair in enumerate(pairs) if any(t.shape[-1] for t in pair)]
    for slot, i in zip((layer_idx, num_layers + layer_idx), filled):
        if getattr(cache, "offloading", False):
            cache.layers[slot].prefetch()               # an attention layer without residuals breaks the chain in which layers fetch each other
        empty = [j for j in (0, 1) if pairs[i][j].shape[-1] == 0]
        if not empty:
            pairs[i] = list(cache.update(*pairs[i], slot))
            continue
        [present] = {0, 1} - set(empty)
        pairs[i][present], pairs[i][empty[0]] = _update_alone(cache, slot, pairs[i][present], pairs[i][empty[0]])
    (key_base, value_base), (key_residual, value_residual) = (
        pair if i in filled else [_empty_like(t, pairs[filled[0]][0]) for t in pair] for i, pair in enumerate(pairs))
    return (key_base, key_residual), (value_base, value_residual)


def _update_alone(cache: Cache, slot: int, tensor: torch.Tensor, empty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`update` of a pair of which one has no width. A quantised layer takes scales of both, so it is given two halves instead."""
    if slot < len(cache.layers) and hasattr(cache.layers[slot], "_quantize") and tensor.shape[-1] > 1:
        tensor = torch.cat(cache.update(*(half.contiguous() for half in tensor.tensor_split(2, dim=-1)), slot), dim=-1)
        return tensor, empty.new_empty(*empty.shape[:2], tensor.shape[2], 0)
    return cache.update(tensor, empty, slot)


def _empty_like(tensor: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """`tensor` (no width) at the batch and length of the cached ones."""
    return tensor.new_empty(cached.shape[0], tensor.shape[1], cached.shape[2], 0)
