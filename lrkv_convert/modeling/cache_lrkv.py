"""Where factored keys and values lie: two layers of a transformers cache per attention layer, bases
apart from residuals. Travels with every converted checkpoint.
"""

import copy
import math

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class NoLayer(CacheLayerMixin):
    """Stands where an attention layer has no residuals, or no bases, to keep: holds nothing, and
    minds nothing a cache does to its layers.
    """

    is_compileable = is_croppable = True
    is_sliding = False

    def __init__(self):
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        raise ValueError("this layer keeps nothing")

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("this layer keeps nothing")

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def nothing(self, *args, **kwargs):
        return None

    offload = prefetch = reset = reorder_cache = crop = batch_repeat_interleave = (
        batch_select_indices
    ) = activate_past_recording = nothing


def with_residual_layers(cache: Cache | None, config) -> Cache | None:
    """Give a decoder's cache two cache layers per attention layer; see `two_per_layer`."""
    return two_per_layer(cache, config.lrkv, config.num_hidden_layers)


def two_per_layer(cache: Cache | None, spec: dict, L: int) -> Cache | None:
    """Give a transformers cache two cache layers per attention layer: bases in layers [0, L),
    residuals in [L, 2 L).

    spec: widths and ranks of the L layers, as `config.lrkv`. The two must be apart (the residual is
    head-major, the base has one head), and standard cache layers keep every transformers cache
    (dynamic, static, sliding, offloaded, quantised) usable as it is. The second half copies the
    still empty first half. A layer with bases alone or residuals alone keeps them in the first
    half.
    """
    if cache is not None and len(cache.layers) == L and cache.layer_class_to_replicate is None:
        if any(layer.is_initialized for layer in cache.layers):
            if any(int(layer.get_seq_length()) for layer in cache.layers):
                raise ValueError(
                    "this cache was filled by another model: an LRKV model needs one of its own"
                )
            # shaped for whole keys and values before anything was cached
            for layer in cache.layers:
                layer.keys = layer.values = None
                layer.is_initialized = False
        parts = lambda name, i: any(spec[side][name][i] for side in ("keys", "values"))
        cache.layers.extend(
            (
                copy.deepcopy(cache.layers[i])
                if parts("base_width", i) and parts("rank", i)
                else NoLayer()
            )
            for i in range(L)
        )
    return cache


def update_cache(
    cache: Cache, layer_idx: int, num_layers: int, keys: tuple, values: tuple
) -> tuple[tuple, tuple]:
    """Append this step's (base, residual) of keys and values; return those of all cached tokens.

    Cache layers look at their first tensor for the length, so an empty one (m = 0 or r = 0) never
    stands first, and a pair of two empty ones takes no layer at all.
    """
    # [[base K, base V], [residual K, residual V]]
    pairs = [list(pair) for pair in zip(keys, values)]
    filled = [i for i, pair in enumerate(pairs) if any(t.shape[-1] for t in pair)]
    for slot, i in zip((layer_idx, num_layers + layer_idx), filled):
        layer = cache.layers[slot] if slot < len(cache.layers) else None
        if getattr(cache, "offloading", False):
            # an attention layer without residuals breaks the chain in which layers fetch each other
            layer.prefetch()
        empty = [j for j in (0, 1) if pairs[i][j].shape[-1] == 0]
        # HQQ, Quanto: groups must divide what a token adds
        if hasattr(layer, "q_group_size") and not layer.is_initialized:
            widths = [
                t.shape[1] * w
                for t in pairs[i]
                for w in (_halves(t.shape[-1]) if empty else (t.shape[-1],))
                if w
            ]
            layer.q_group_size = math.gcd(layer.q_group_size, *widths)
        if not empty:
            pairs[i] = list(cache.update(*pairs[i], slot))
            continue
        [present] = {0, 1} - set(empty)
        pairs[i][present], pairs[i][empty[0]] = _update_alone(
            cache, slot, pairs[i][present], pairs[i][empty[0]]
        )
    (key_base, value_base), (key_residual, value_residual) = (
        pair if i in filled else [_empty_like(t, pairs[filled[0]][0]) for t in pair]
        for i, pair in enumerate(pairs)
    )
    return (key_base, key_residual), (value_base, value_residual)


def _halves(width: int) -> tuple[int, int]:
    """As `tensor_split` cuts a width in two."""
    return (width + 1) // 2, width // 2


def _update_alone(
    cache: Cache, slot: int, tensor: torch.Tensor, empty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`update` of a pair of which one has no width. A quantised layer takes scales of both, so it
    is given two halves instead, or one number twice.
    """
    if slot >= len(cache.layers) or not hasattr(cache.layers[slot], "_quantize"):
        return cache.update(tensor, empty, slot)
    if tensor.shape[-1] == 1:
        tensor, _ = cache.update(tensor, tensor, slot)
    else:
        tensor = torch.cat(
            cache.update(*(half.contiguous() for half in tensor.tensor_split(2, dim=-1)), slot),
            dim=-1,
        )
    return tensor, empty.new_empty(*empty.shape[:2], tensor.shape[2], 0)


def _empty_like(tensor: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """`tensor` (no width) at the batch and length of the cached ones."""
    return tensor.new_empty(cached.shape[0], tensor.shape[1], cached.shape[2], 0)


def read_cache(cache: Cache, layer_idx: int, num_layers: int, keys, values) -> tuple[tuple, tuple]:
    """(base, residual) of keys and of values that `update_cache` wrote earlier, nothing added.
    keys, values: the `LowRankHeads` that made them.
    """
    widths = [(keys.base_width, values.base_width), (keys.rank, values.rank)]
    filled = [i for i, pair in enumerate(widths) if any(pair)]
    pairs = [None, None]
    for slot, i in zip((layer_idx, num_layers + layer_idx), filled):
        held = cache.layers[slot].keys, cache.layers[slot].values
        # one without width never stands first
        pairs[i] = held if widths[i][0] else held[::-1]
    N, _, S, _ = pairs[filled[0]][0].shape
    for i, heads in enumerate((1, keys.num_heads)):
        pairs[i] = pairs[i] or [pairs[filled[0]][0].new_empty(N, heads, S, 0)] * 2
    (key_base, value_base), (key_residual, value_residual) = pairs
    return (key_base, key_residual), (value_base, value_residual)
