"""LRKV in the decoders of encoder-decoder models: self-attention, whose cache grows by a token a
step, and cross-attention, whose cache is written once per input, from the encoder's states, and
read at every step. Travels with every converted checkpoint of such a family.

Either kind may be converted alone: `config.lrkv` is the shape of self-attention,
`config.lrkv_cross` that of cross-attention, None where it is left as it was. None of these families
rotates its keys, so what is cached is read in place (attention_lrkv.py, the split path).

Shapes: N batch, T decoder tokens, S cached tokens or encoder positions, H heads, D model width, d
head width. This file may import torch, transformers and its siblings only.
"""

import copy

from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from .attention_lrkv import LrkvAttention
from .cache_lrkv import pair_count, read_cache, update_cache, with_pairs
from .contract_lrkv import (
    Written,
    cache_argument,
    note_written,
    parameters,
    require_arguments,
    take_cache,
)
from .models_lrkv import LrkvPreTrained

# kind of attention -> field of the config with its widths and ranks
FIELDS = {"self": "lrkv", "cross": "lrkv_cross"}


class LrkvDecoderAttention(LrkvAttention):
    """Mixin over a family's attention class, of either kind: cross-attention is the one that is
    handed `key_value_states`.
    """

    @property
    def kind(self) -> str:
        return "self" if self.is_causal else "cross"

    num_layers: int  # of the decoder; a config's num_hidden_layers may be the encoder's

    def cached(self, hidden_states, key_value_states, given, mask) -> tuple[tuple, tuple]:
        """What is cached of keys and of values that are attended to, as `LowRankHeads.encode` gives
        it. In cross-attention it is made of key_value_states (N, S, D) and, once written, only
        read. given: the cache, of both kinds of attention or of this one, or None.
        """
        cross, cache = key_value_states is not None, given
        if isinstance(given, EncoderDecoderCache):
            cache = given.cross_attention_cache if cross else given.self_attention_cache
            if cross and given.is_updated.get(self.layer_idx):
                note_written(cache, mask)
                return read_cache(cache, self.layer_idx, self.num_layers, self.keys, self.values)
        states = key_value_states if cross else hidden_states
        through = cache is None
        keys, values = (side.encode(states, through=through) for side in (self.keys, self.values))
        if cache is not None:
            keys, values = update_cache(cache, self.layer_idx, self.num_layers, keys, values)
            note_written(cache, mask)
            if cross and isinstance(given, EncoderDecoderCache):
                given.is_updated[self.layer_idx] = True
            if self.gradients_end(states, keys):
                return self.keys.encode(states, through=True), self.values.encode(
                    states, through=True
                )
        return keys, values

    def read_in_place(self, path, query, keys, values, attention_mask, *more):
        # every encoder position is seen, not only the first T
        if attention_mask is None and not self.is_causal and query.shape[2] > 1:
            attention_mask = query.new_zeros(1, 1, 1, keys[0].shape[2])
        return super().read_in_place(path, query, keys, values, attention_mask, *more)


class LrkvBartAttention(LrkvDecoderAttention):
    """Mixin over attention as BART has it: q_proj and out_proj. Differs from the parent: no k_proj
    and v_proj.
    """

    def __init__(self, config, layer_idx: int, kind: str):
        super().__init__(
            config.d_model,
            config.decoder_attention_heads,
            dropout=config.attention_dropout,
            is_decoder=True,
            is_causal=kind == "self",
            layer_idx=layer_idx,
            config=config,
        )
        self.num_layers = config.decoder_layers
        self.take_over(
            config,
            layer_idx,
            "k_proj",
            "v_proj",
            name=FIELDS[kind],
            width=config.d_model,
            heads=self.num_heads,
            head_dim=self.head_dim,
        )

    def queries(self, hidden_states):
        """(N, T, D) -> (N, H, T, d)."""
        return self.heads_of(self.q_proj(hidden_states))

    def forward(self, hidden_states, key_value_states=None, attention_mask=None, **kwargs):
        cache = take_cache(kwargs)
        keys, values = self.cached(hidden_states, key_value_states, cache, attention_mask)
        output, weights = self.attend(
            self.queries(hidden_states),
            keys,
            values,
            attention_mask,
            None,
            cache is not None,
            self.dropout,
            **kwargs,
        )
        return self.out_proj(output), weights


class LrkvDecoder(LrkvPreTrained):
    """Mixin over a family's decoder: swaps in the attention modules of the kinds that are
    converted, and prepares any cache it is given.
    """

    attention_class: type
    # where they are in a layer
    attention_names = {"self": "self_attn", "cross": "encoder_attn"}

    def __init__(self, config):
        super().__init__(config)
        self.cache_pairs = {kind: [] for kind in self.attention_names}
        for layer_idx, layer in enumerate(self.decoder_layers()):
            for kind, place in self.attention_names.items():
                if getattr(config, FIELDS[kind]) is not None:
                    parent, _, name = place.rpartition(".")
                    attention = self.attention_class(config, layer_idx, kind)
                    setattr(layer.get_submodule(parent), name, attention)
                    self.cache_pairs[kind].append(pair_count(attention.keys, attention.values))
        require_arguments(self.attention_class, rotary=False)
        self.given_as, self.arguments = cache_argument(super().forward), parameters(super().forward)
        self.post_init()

    def decoder_layers(self) -> nn.ModuleList:
        return self.layers

    def forward(self, *given, use_cache=None, **kwargs):
        kwargs.update(zip(self.arguments, given))  # as the family's own forward takes them
        both, input_ids = take_cache(kwargs), kwargs.pop("input_ids", None)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and both is None and not (self.training and self.gradient_checkpointing):
            both = EncoderDecoderCache(
                DynamicCache(config=self.config), DynamicCache(config=self.config)
            )
        written = []
        if isinstance(both, EncoderDecoderCache):
            states, embeds, implementation = (
                kwargs.get("encoder_hidden_states"),
                kwargs.get("inputs_embeds"),
                self.config._attn_implementation,
            )
            seen = 0 if states is None or both.is_updated.get(0) else states.shape[1]
            tokens = (input_ids if embeds is None else embeds).shape[1]
            for cache, kind, added, mask in (
                (both.self_attention_cache, "self", tokens, kwargs.get("attention_mask")),
                (both.cross_attention_cache, "cross", seen, None),
            ):
                L, pairs = len(self.decoder_layers()), self.cache_pairs[kind]
                if (
                    len(cache.layers) not in (L, L * max(2, *pairs, 0))
                    and cache.layer_class_to_replicate is None
                ):
                    fit_layers(cache, L)
                if pairs:
                    with_pairs(cache, pairs)
                    # see models_lrkv.py
                    if not self.training and (kind == "self" or states is not None):
                        written.append(
                            Written(cache, L, added, mask, implementation if kind == "self" else "")
                        )
        elif both is not None:
            raise ValueError(
                f"{type(self).__name__} needs an EncoderDecoderCache, not a {type(both).__name__}"
            )
        output = super().forward(input_ids, **{self.given_as: both}, use_cache=use_cache, **kwargs)
        for one in written:
            one.check()
        return output


def fit_layers(cache, L: int) -> None:
    """As many layers as the decoder has: `generate` takes the encoder's number where a config knows
    no other.
    """
    if any(layer.is_initialized for layer in cache.layers):
        raise ValueError(
            f"this cache has {len(cache.layers)} layers and is filled, but the decoder has {L}"
        )
    cache.layers[:] = [copy.deepcopy(cache.layers[0]) for _ in range(L)]
