"""Attention over Low-Rank Key-Value heads (factors_lrkv.py): one module, three equivalent paths, and the choice between them. Travels with
every converted checkpoint.

    rebuild   K_h and V_h are materialised and go through whatever attention function the user chose: training, prefill
    split     torch alone, Eq 6-7 of arXiv 2601.11471: values are never materialised, keys only in chunks where RoPE asks for it: decoding
    kernel    the same, fused, in Triton (kernel_lrkv.py): decoding on a GPU

`choose_path` decides; `config.lrkv_path` ("auto", or one of the three) forces one, also as `from_pretrained(..., lrkv_path="split")`.

Shapes: N batch, T tokens, S cached tokens, H KV heads, G query heads per KV head, D model width, d head width.
This file may import torch, transformers and its siblings only.
"""
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_lrkv import update_cache, with_residual_layers
from .factors_lrkv import LowRankHeads, low_rank_heads, rotate
from .kernel_lrkv import decode
from .kernel_lrkv import missing as missing_for_kernel

logger = logging.get_logger(__name__)
PATHS = ("auto", "rebuild", "split", "kernel")
SCORES = 1 << 21        # scores above which a CPU takes one row of the batch at a time: larger temporaries go back to the system at every step, and to
                        # get them again can cost as much as the step (32K tokens, batch 4: 85 or 185 ms, by the state of the heap; row by row always 85)
SPLIT_QUERIES = 16      # queries per KV head up to which reading in place does less work than rebuilding (it grows with them, rebuilding does not)


# ------------------------------------------------------------------------------------------------ the choice

def choose_path(asked: str, *, queries: int, tokens: int, implementation: str, mask, training: bool, cached: bool, device: torch.device,
                dtype: torch.dtype, outside_window: bool = False, differentiable: bool = False) -> str:
    """Which path attends: "rebuild", "split" or "kernel".

    asked: one of PATHS. queries: G T per KV head; tokens: T; implementation: the attention function of the config; mask: None or what
    transformers made for that function; cached: whether there is a cache to read; outside_window: whether some of it lies outside a sliding
    window, which only eager and sdpa are told by their mask; differentiable: whether gradients are wanted, which the kernel has none of.
    Raises ValueError for a path that does not exist or cannot run here.
    """
    if asked not in PATHS:
        raise ValueError(f"config.lrkv_path is {asked!r}: it must be one of {', '.join(PATHS)}")
    missing = missing_for_kernel(device, dtype)
    if asked == "kernel" and missing:
        raise ValueError(f"config.lrkv_path is 'kernel', but {missing}")
    readable = mask is None or isinstance(mask, torch.Tensor) and mask.dim() in (2, 4)          # flex attention has masks of its own
    # whether the mask says all that is not to be seen; paged attention keeps its cache to itself, and functions of the user's own mean something
    complete = implementation in ("eager", "sdpa") or implementation.startswith("flash") and tokens == 1 and cached and not outside_window
    if asked == "rebuild" or training or not readable or not complete:
        return "rebuild"
    if asked == "auto" and (not cached or queries > SPLIT_QUERIES):
        return "rebuild"
    one_mask = mask is None or mask.dim() == 2 or mask.shape[1] == 1
    wanted = asked == "kernel" or asked == "auto" and device.type != "cpu" and implementation != "eager"         # eager: its weights may be asked for
    path = "kernel" if wanted and not missing and tokens == 1 and one_mask and not differentiable else "split"
    if device.type != "cpu" and not torch.compiler.is_compiling():
        logger.warning_once(f"LRKV decodes through the {path} path" + (f": {missing}" if missing else ""))
    return path


def added_mask(mask: torch.Tensor | None, tokens: int, length: int, device: torch.device) -> torch.Tensor | None:
    """A mask in any of transformers' forms -> float32 numbers to add to scores, (1 or N, 1 or H G, T, S), or None if nothing is masked."""
    if mask is None and tokens > 1:                     # sdpa's "causal": the queries are the first tokens, what a static cache holds behind them is empty
        mask = torch.ones(tokens, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return None
    if mask.dim() == 2:                                 # flash attention: which cached tokens are there, (N, S)
        mask = mask[:, None, None, -length:].bool()
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask[..., :length].float()


# ------------------------------------------------------------------------------------------------ attention

class LrkvAttention:
    """Mixin over a family's attention class: keys and values come from `LowRankHeads`, everything else stays the family's."""

    def factored_attention(self, query, hidden_states, attention_mask, past_key_values, rotations=None, dropout=0.0, **kwargs):
        """Attention of query (N, H G, T, d), before rotation, to hidden_states (N, T, D) and what is cached.

        rotations: (cos, sin) of the queries and of all cached keys, or None. Returns ((N, T, H G d), weights or None).
        """
        of_queries, of_keys = rotations or (None, None)
        keys, values = self.keys.encode(hidden_states, of_queries), self.values.encode(hidden_states)
        if past_key_values is not None:
            keys, values = update_cache(past_key_values, self.layer_idx, self.config.num_hidden_layers, keys, values)
        query = query if rotations is None else rotate(query, of_queries)
        implementation, T, window = self.config._attn_implementation, query.shape[2], kwargs.get("sliding_window")
        paged = kwargs.get("cache") is not None         # continuous batching: the attention function keeps the cache, of whole keys and values
        path = "rebuild" if paged else choose_path(
            self.config.lrkv_path, queries=T * query.shape[1] // self.keys.num_heads, tokens=T, implementation=implementation, mask=attention_mask,
            training=self.training, cached=past_key_values is not None, device=query.device, dtype=keys[0].dtype,
            outside_window=bool(window) and keys[0].shape[2] > window, differentiable=self.wants_gradients(query, *keys, *values))
        if path == "rebuild":
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager_attention)
            output, weights = attend(self, query, self.keys.rebuild(*keys, of_keys), self.values.rebuild(*values), attention_mask,
                                     dropout=dropout if self.training else 0.0, scaling=self.scaling, **kwargs)
        else:
            output, weights = self.read_in_place(path, query, keys, values, attention_mask, of_keys, with_weights=implementation == "eager")
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights

    def wants_gradients(self, *tensors) -> bool:
        """Whether anything that decoding reads, or the maps it reads it with, is being differentiated."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.keys.parameters(), *self.values.parameters()))

    def read_in_place(self, path, query, keys, values, attention_mask, rotation, with_weights=False):
        """Split or kernel path: query (N, H G, T, d), rotated; keys and values as cached. Returns ((N, T, H G, d), weights (N, H G, T, S) or None)."""
        N, heads, T, d = query.shape
        length = keys[0].shape[2]
        grouped = query.reshape(N, self.keys.num_heads, -1, d)                  # (N, H, G T, d)
        mask = added_mask(attention_mask, T, length, query.device)
        if path == "kernel":
            output = decode(self.keys, self.values, grouped, keys, values, rotation, mask, self.scaling)
            return output.reshape(N, heads, T, d).transpose(1, 2), None
        if N > 1 and N * heads * T * length > SCORES and query.device.type == "cpu" and not torch.compiler.is_compiling():
            part = lambda t, n: t if t is None or len(t) == 1 else t[n:n + 1]
            rows = [self.read_in_place(path, query[n:n + 1], *([part(t, n) for t in side] for side in (keys, values)), part(mask, n),
                                       None if rotation is None else [part(t, n) for t in rotation], with_weights) for n in range(N)]
            return torch.cat([output for output, _ in rows]), torch.cat([weights for _, weights in rows]) if with_weights else None
        scores = self.keys.scores(grouped * self.scaling, *keys, rotation).reshape(N, heads, T, -1)
        scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)       # (N, H G, T, S)
        output = self.values.average(weights.reshape(N, self.keys.num_heads, -1, length), *values)      # (N, H, G T, d)
        return output.reshape(N, heads, T, d).transpose(1, 2), weights if with_weights else None


def layer_kinds(config) -> list[str]:
    """The kind of each layer: layers of a kind have caches of a kind."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


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
        rotations = (position_embeddings, position_embeddings) if lrkv_rotations is None else lrkv_rotations[layer_kinds(self.config)[self.layer_idx]]
        output, weights = self.factored_attention(query, hidden_states, attention_mask, past_key_values, rotations,
                                                  self.attention_dropout, **self.window(), **kwargs)
        return self.o_proj(output), weights


# ------------------------------------------------------------------------------------------------ models

class LrkvPreTrained:
    """Mixin over a family's PreTrainedModel: how the factors start when a model is built from its config alone, and what batching costs."""

    def init_continuous_batching(self, *args, **kwargs):
        logger.warning_once("continuous batching keeps whole keys and values in its pages: an LRKV model generates the same there, but its cache is as large "
                            "as the original's (`generate` and a server without continuous batching have the small one)")
        return super().init_continuous_batching(*args, **kwargs)

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
        past_key_values = with_residual_layers(past_key_values, self.config)
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
        kinds = layer_kinds(self.config)
        sizes = {kind: cache.get_mask_sizes(T, kinds.index(kind)) for kind in dict.fromkeys(kinds)}         # kind: (length, offset)
        if form != "rotary" and all(length == T and offset == 0 for length, offset in sizes.values()):
            return {}
        held = cache.get_seq_length()
        # what a static cache has not filled yet is masked, and must not seem to be a longer text: some RoPE variants change with the length
        rotation = lambda start, length: self.rotary_emb(x, (torch.arange(length, device=x.device) + start).clamp(max=held + T - 1).unsqueeze(0))
        query = rotation(held, T)
        return {"lrkv_rotations": {kind: (query, rotation(offset, length)) for kind, (length, offset) in sizes.items()}}
