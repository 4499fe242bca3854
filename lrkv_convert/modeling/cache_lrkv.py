"""Where factored keys and values lie: several layers of a transformers cache per attention layer,
one for each pair of slots, since a cache layer holds one tensor of keys and one of values with as
many heads. Travels with every converted checkpoint.

With L attention layers, pair p of layer i lies in cache layer p L + i: bases, which have one head,
in the first L, residuals, which are head-major, in the next. A layer without bases, or without
residuals, has one pair, in the first L.
"""

import copy
import math
from itertools import zip_longest

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class NoLayer(CacheLayerMixin):
    """Stands where an attention layer has fewer pairs than others: holds nothing, whatever a cache
    does to its layers.
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


def filled_pairs(keys: list, values: list) -> list[int]:
    """The places at which keys or values have something to cache: of their slots, (heads, width)
    each.
    """
    pairs = zip_longest(keys, values, fillvalue=(0, 0))
    return [i for i, pair in enumerate(pairs) if any(width for _, width in pair)]


def pair_count(keys, values) -> int:
    """How many cache layers an attention layer needs. keys, values: its `LowRankHeads`. Raises
    ValueError for slots that do not fit into one cache layer.
    """
    for pair in zip(keys.slots(), values.slots()):
        if len({heads for heads, width in pair if width}) > 1:
            raise ValueError(f"slots of {pair[0][0]} and {pair[1][0]} heads do not share a layer")
    return len(filled_pairs(keys.slots(), values.slots()))


def with_pairs(cache: Cache | None, pairs: list[int]) -> Cache | None:
    """Give a transformers cache a layer for each pair of slots. pairs: how many each attention
    layer has (`pair_count`).

    Standard cache layers keep every transformers cache (dynamic, static, sliding, offloaded,
    quantised) usable as it is. Layers beyond the first L copy those, which are still empty. There
    are at least 2 L, so that the number says that it was done.
    """
    L = len(pairs)
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
        cache.layers.extend(
            copy.deepcopy(cache.layers[i]) if place < pairs[i] else NoLayer()
            for place in range(1, max(2, *pairs))
            for i in range(L)
        )
    return cache


def update_cache(
    cache: Cache, layer_idx: int, num_layers: int, keys: tuple, values: tuple
) -> tuple[tuple, tuple]:
    """Append this step's keys and values, a tensor (N, heads, T, width) for each slot; return those
    of all cached tokens.

    Cache layers look at their first tensor for the length, so an empty one never stands first, and
    a pair of two empty ones takes no layer at all.
    """
    pairs = list(zip_longest(keys, values))
    held = [[t is not None and t.shape[-1] > 0 for t in pair] for pair in pairs]
    filled = [i for i, pair in enumerate(held) if any(pair)]
    found = [[None, None] for _ in pairs]
    for place, i in enumerate(filled):
        slot = place * num_layers + layer_idx
        layer = cache.layers[slot] if slot < len(cache.layers) else None
        if getattr(cache, "offloading", False):
            # an attention layer with fewer pairs breaks the chain in which layers fetch each other
            layer.prefetch()
        present = [t for t, there in zip(pairs[i], held[i]) if there]
        if hasattr(layer, "_quantize") and any(t.dtype == torch.uint8 for t in present):
            raise ValueError(
                "this model caches codes, a few bits each, and a quantised cache would round them"
                " again: use an ordinary cache, which is as small"
            )
        # HQQ, Quanto: groups must divide what a token adds
        if hasattr(layer, "q_group_size") and not layer.is_initialized:
            widths = [
                t.shape[1] * w
                for t in present
                for w in (_halves(t.shape[-1]) if len(present) == 1 else (t.shape[-1],))
                if w
            ]
            layer.q_group_size = math.gcd(layer.q_group_size, *widths)
        if len(present) == 2:
            found[i] = list(cache.update(*present, slot))
        else:
            found[i][held[i].index(True)] = _update_alone(cache, slot, present[0])
    return _sides(found, pairs)


def _sides(found: list[list], like: list) -> tuple[tuple, tuple]:
    """Pairs of cached tensors -> those of keys and those of values; one of no width is made, at
    the batch and length of the others. like: tensors of the same heads, or None beyond the slots of
    a side.
    """
    N, _, S, _ = next(t for pair in found for t in pair if t is not None).shape
    keys, values = (
        tuple(
            t.new_empty(N, t.shape[1], S, 0) if pair[side] is None else pair[side]
            for pair, shaped in zip(found, like)
            if (t := shaped[side]) is not None
        )
        for side in (0, 1)
    )
    return keys, values


def _halves(width: int) -> tuple[int, int]:
    """As `tensor_split` cuts a width in two."""
    return (width + 1) // 2, width // 2


def _update_alone(cache: Cache, slot: int, tensor: torch.Tensor) -> torch.Tensor:
    """`update` of a pair of which the other has no width. A quantised layer takes scales of both,
    so it is given two halves instead, or one number twice.
    """
    if slot >= len(cache.layers) or not hasattr(cache.layers[slot], "_quantize"):
        return cache.update(tensor, tensor[..., :0], slot)[0]
    if tensor.shape[-1] == 1:
        return cache.update(tensor, tensor, slot)[0]
    halves = (half.contiguous() for half in tensor.tensor_split(2, dim=-1))
    return torch.cat(cache.update(*halves, slot), dim=-1)


def read_cache(cache: Cache, layer_idx: int, num_layers: int, keys, values) -> tuple[tuple, tuple]:
    """Keys and values that `update_cache` wrote earlier, nothing added. keys, values: the
    `LowRankHeads` that made them.
    """
    slots = list(zip_longest(keys.slots(), values.slots()))
    found = [[None, None] for _ in slots]
    for place, i in enumerate(filled_pairs(keys.slots(), values.slots())):
        layer = cache.layers[place * num_layers + layer_idx]
        there = [side for side in (0, 1) if slots[i][side] is not None and slots[i][side][1]]
        # one without width never stands first
        for side, held in zip(there, (layer.keys, layer.values)):
            found[i][side] = held
    one = next(t for pair in found for t in pair if t is not None)
    dtype = keys.dtype if one.dtype == torch.uint8 else one.dtype  # only codes are bytes
    like = [
        [None if slot is None else one.new_empty(1, slot[0], 1, 0, dtype=dtype) for slot in pair]
        for pair in slots
    ]
    return _sides(found, like)
