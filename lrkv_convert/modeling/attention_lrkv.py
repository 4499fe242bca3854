"""Low-Rank Key-Value attention: the module that replaces k_proj and v_proj, and its cache. Travels with every converted checkpoint.

Each KV head h of a layer computes, for keys and for values alike (O'Neill et al., "Low-Rank Key Value Attention", arXiv 2601.11471, Eq 2-5),

    K_h = s C_h + R_h B_h^T + b_h        s = x W_shared (m numbers, one for all heads)       R_h = x U_h (r numbers per head)

and caches only s and R_h: m + H r numbers per token instead of H d. C_h is an alignment map (weights, never cached); the paper's own form is
m = d and C_h = I. Keys are cached before RoPE: the rotation does not commute with B_h, so a key is rebuilt first and rotated afterwards. Two
other forms of keys cache less before it, or nothing (`LowRankHeads.form`).

Shapes: N batch, T tokens, H KV heads, G query heads per KV head, D model width, d head width, m base width, r residual rank.
This file may import torch and transformers only.
"""
import copy
import math

import torch
from torch import nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class LowRankHeads(nn.Module):
    """Keys or values of all KV heads of one layer, in factored form.

    Args: width D, num_heads H, head_dim d, base_width m >= 0, rank r >= 0 (m + r > 0), alignment (whether C is there; without it m must be
    d or 0), bias (whether b is there), form: what is cached of keys under RoPE. Raises ValueError when these do not fit together.

        "joint"     base and residual before rotation: keys are rebuilt, then rotated
        "rotary"    the base after rotation (C = I: it passes through RoPE as it is), the residual before
        "full"      the keys themselves after rotation, as residuals of rank d without B: nothing to rebuild
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, base_width: int, rank: int, alignment: bool, bias: bool, form: str = "joint"):
        super().__init__()
        if base_width < 0 or rank < 0 or base_width + rank == 0:
            raise ValueError(f"LRKV needs base_width >= 0, rank >= 0 and one of them positive, got {base_width} and {rank}")
        if not alignment and base_width not in (0, head_dim):
            raise ValueError(f"without alignment maps the base must be as wide as a head ({head_dim}), got {base_width}")
        if form not in ("joint", "rotary", "full") or form == "rotary" and alignment or form == "full" and (base_width, rank) != (0, head_dim):
            raise ValueError(f"form {form!r} does not go with base_width {base_width}, rank {rank} and alignment {alignment}")
        self.width, self.num_heads, self.head_dim, self.base_width, self.rank = width, num_heads, head_dim, base_width, rank
        self.form = form
        self.W_shared = nn.Linear(width, base_width, bias=False) if base_width else None      # weight (m, D)
        self.C = nn.Parameter(torch.empty(num_heads, base_width, head_dim)) if base_width and alignment else None
        self.U = nn.Linear(width, num_heads * rank, bias=False) if rank else None             # weight (H r, D), head-major
        self.B = nn.Parameter(torch.empty(num_heads, head_dim, rank)) if rank and form != "full" else None
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim)) if bias else None

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, head_dim={self.head_dim}, base_width={self.base_width}, rank={self.rank}"

    def encode(self, x: torch.Tensor, rotation: tuple | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (N, T, D) -> what the cache holds: base (N, 1, T, m) and residual (N, H, T, r). rotation: (cos, sin) of these T tokens."""
        N, T, _ = x.shape
        base = self.W_shared(x).unsqueeze(1) if self.W_shared is not None else x.new_empty(N, 1, T, 0)                      # (N, 1, T, m)
        residual = (self.U(x).view(N, T, self.num_heads, self.rank).transpose(1, 2) if self.U is not None
                    else x.new_empty(N, self.num_heads, T, 0))                                                              # (N, H, T, r)
        if self.form == "rotary" and self.W_shared is not None:
            base = rotate(base, rotation)
        if self.form == "full":
            residual = residual if self.bias is None else residual + self.bias.unsqueeze(1)
            residual = residual if rotation is None else rotate(residual, rotation)
        return base, residual

    def rebuild(self, base: torch.Tensor, residual: torch.Tensor, rotation: tuple | None = None) -> torch.Tensor:
        """base (N, 1, T, m), residual (N, H, T, r) -> keys, or values, (N, H, T, d) (Eq 4-5). rotation: (cos, sin) of all cached tokens."""
        if self.form == "full":
            return residual
        heads, rotated = None, None
        if self.form == "rotary":
            rotated = base if self.W_shared is not None else None               # (N, 1, T, d)
        elif self.W_shared is not None:
            heads = base if self.C is None else self._aligned(base)             # (N, 1 or H, T, d)
        if self.U is not None:
            own = residual @ self.B.transpose(1, 2)                             # (N, H, T, d)
            heads = own if heads is None else heads + own
        if self.bias is not None:
            bias = self.bias.unsqueeze(1).to(base.dtype)                        # (H, 1, d)
            heads = bias.expand(len(base), -1, base.shape[2], -1) if heads is None else heads + bias
        if heads is not None and rotation is not None:
            heads = rotate(heads, rotation)
        heads = rotated if heads is None else heads if rotated is None else rotated + heads
        return heads.expand(-1, self.num_heads, -1, -1)

    def _aligned(self, base: torch.Tensor) -> torch.Tensor:
        """s C_h for all heads in one product: (N, 1, T, m) -> (N, H, T, d)."""
        N, _, T, m = base.shape
        C = self.C.transpose(0, 1).reshape(m, self.num_heads * self.head_dim)   # (m, H d)
        return (base.reshape(N, T, m) @ C).view(N, T, self.num_heads, self.head_dim).transpose(1, 2)

    def reset_parameters(self) -> None:
        """The paper's start from scratch: Kaiming base; U, B random with |U_h B_h^T| about a tenth of the base (Sec 3)."""
        std = 1 / math.sqrt(self.width)
        if self.W_shared is not None:
            init.normal_(self.W_shared.weight, std=std)
        if self.C is not None:
            init.copy_(self.C, torch.eye(self.base_width, self.head_dim).expand(self.num_heads, -1, -1))
        if self.U is not None:
            init.normal_(self.U.weight, std=std * math.sqrt(0.1))
        if self.B is not None:
            init.normal_(self.B, std=math.sqrt(0.1 / self.rank))
        if self.bias is not None:
            init.zeros_(self.bias)


def low_rank_heads(config, layer_idx: int, side: str, bias: bool) -> LowRankHeads:
    """The keys' or values' module of one layer, from `config.lrkv`.

    config.lrkv = {"keys": {"base_width": [m per layer], "rank": [r per layer], "alignment": bool, "form": str}, "values": {...}}.
    """
    if config.lrkv is None:
        raise ValueError(f"{type(config).__name__} has no `lrkv` field: it must give base widths and ranks per layer")
    spec, head_dim = config.lrkv[side], getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LowRankHeads(config.hidden_size, getattr(config, "num_key_value_heads", config.num_attention_heads), head_dim,
                        spec["base_width"][layer_idx], spec["rank"][layer_idx], spec["alignment"], bias, spec.get("form", "joint"))


# ------------------------------------------------------------------------------------------------ cache

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
        flip = pairs[i][0].shape[-1] == 0
        first, second = reversed(pairs[i]) if flip else pairs[i]
        first, second = cache.update(first, second, slot)
        pairs[i] = [second, first] if flip else [first, second]
    (key_base, value_base), (key_residual, value_residual) = (
        pair if i in filled else [_empty_like(t, pairs[filled[0]][0]) for t in pair] for i, pair in enumerate(pairs))
    return (key_base, key_residual), (value_base, value_residual)


def _empty_like(tensor: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """`tensor` (no width) at the batch and length of the cached ones."""
    return tensor.new_empty(cached.shape[0], tensor.shape[1], cached.shape[2], 0)


# ------------------------------------------------------------------------------------------------ attention

def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE in the half-split layout of transformers: x (N, heads, T, d), cos and sin (1 or N, T, d)."""
    cos, sin = (t.unsqueeze(1) for t in rotation)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class LrkvAttention:
    """Mixin over a family's attention class: keys and values come from `LowRankHeads`, everything else stays the family's."""

    def factored_attention(self, query, hidden_states, attention_mask, past_key_values, rotations=None, dropout=0.0, **kwargs):
        """Rebuild path: K_h and V_h are materialised and go through whatever attention function the user chose.

        query (N, H G, T, d) before rotation; rotations (for the queries, for all cached keys) or None. Returns ((N, T, H G d), weights).
        """
        of_queries, of_keys = rotations or (None, None)
        keys, values = self.keys.encode(hidden_states, of_queries), self.values.encode(hidden_states)
        if past_key_values is not None:
            keys, values = update_cache(past_key_values, self.layer_idx, self.config.num_hidden_layers, keys, values)
        key, value = self.keys.rebuild(*keys, of_keys), self.values.rebuild(*values)        # (N, H, T', d)
        if rotations is not None:
            query = rotate(query, of_queries)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout if self.training else 0.0,
                                 scaling=self.scaling, **kwargs)
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class LrkvRotaryAttention(LrkvAttention):
    """Forward for Llama-shaped attention (q_proj, o_proj, RoPE). Differs from the parent: no k_proj and v_proj, keys cached before RoPE."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        key_bias, value_bias = self.k_proj.bias is not None, self.v_proj.bias is not None
        del self.k_proj, self.v_proj
        self.keys = low_rank_heads(config, layer_idx, "keys", key_bias)
        self.values = low_rank_heads(config, layer_idx, "values", value_bias)

    def window(self) -> dict:
        """Extra arguments of the family's attention call."""
        return {}

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, lrkv_rotations=None, **kwargs):
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)   # (N, H G, T, d)
        # keys that lie rotated in the cache keep the positions they were given
        rotations = lrkv_rotations[self.layer_idx] if lrkv_rotations is not None else (position_embeddings, position_embeddings)
        output, weights = self.factored_attention(query, hidden_states, attention_mask, past_key_values, rotations,
                                                  self.attention_dropout, **self.window(), **kwargs)
        return self.o_proj(output), weights


# ------------------------------------------------------------------------------------------------ models

class LrkvPreTrained:
    """Mixin over a family's PreTrainedModel: how the factors start when a model is built from its config alone."""

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LowRankHeads):
            module.reset_parameters()


class LrkvModel(LrkvPreTrained):
    """Mixin over a family's decoder: swaps the attention modules in, and prepares any cache it is given."""

    attention_class: type
    attention_name = "self_attn"

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.decoder_layers()):
            setattr(layer, self.attention_name, self.attention_class(config, layer_idx))
        self.post_init()

    def decoder_layers(self):
        return self.layers

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache is None and past_key_values is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        past_key_values = with_residual_layers(past_key_values, self.config.num_hidden_layers)
        if past_key_values is not None:
            kwargs.update(self.cache_arguments(input_ids, kwargs.get("inputs_embeds"), past_key_values))
        return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    def cache_arguments(self, input_ids, inputs_embeds, cache) -> dict:
        """What the attention modules must know of the cache, as keyword arguments."""
        return {}


class LrkvRotaryModel(LrkvModel):
    """Keys lie in the cache unrotated, so each step rotates all of them, by their index in the cache.

    RoPE scores depend on differences of positions only, and the tokens of a row are consecutive, so the index serves as the position
    even under left padding, as long as the queries are rotated by their index too. While the cache is empty, the positions given hold, unless
    the cache is to keep a rotated base, to which residuals rotated by their index will be added.
    """

    def cache_arguments(self, input_ids, inputs_embeds, cache) -> dict:
        form = self.config.lrkv["keys"].get("form")
        if form == "full":
            return {}
        x = inputs_embeds if inputs_embeds is not None else self.embed_tokens.weight
        T = (inputs_embeds if inputs_embeds is not None else input_ids).shape[1]
        sizes = [cache.get_mask_sizes(T, i) for i in range(self.config.num_hidden_layers)]          # (length, offset) per layer
        if all(size == (T, 0) for size in sizes) and form != "rotary":
            return {}
        query = self.rotary_emb(x, (torch.arange(T, device=x.device) + cache.get_seq_length()).unsqueeze(0))
        keys = {size: self.rotary_emb(x, (torch.arange(size[0], device=x.device) + size[1]).unsqueeze(0)) for size in set(sizes)}
        return {"lrkv_rotations": [(query, keys[size]) for size in sizes]}
