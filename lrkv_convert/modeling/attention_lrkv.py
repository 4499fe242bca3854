"""Attention over Low-Rank Key-Value heads (factors_lrkv.py): one module, three equivalent paths,
and the choice between them. Travels with every converted checkpoint.

    rebuild   K_h and V_h are materialised and go through whatever attention function the user
              chose: training, prefill
    split     torch alone, Eq 6-7 of arXiv 2601.11471: values are never materialised, keys only in
              chunks where RoPE asks for it: decoding
    kernel    the same, fused, in Triton (kernel_lrkv.py): decoding on a GPU

`choose_path` decides; `config.lrkv_path` ("auto", or one of the three) forces one, also as
`from_pretrained(..., lrkv_path="split")`.

Shapes: N batch, T tokens, S cached tokens, H KV heads, G query heads per KV head, D model width, d
head width. This file may import torch, transformers and its siblings only.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cache_lrkv import update_cache
from .contract_lrkv import (
    PAGED_IN_ATTENTION,
    check_interface,
    check_mask,
    check_output,
    check_tables,
    note_written,
    take_cache,
)
from .factors_lrkv import rotate
from .forms_lrkv import low_rank_heads
from .kernel_lrkv import decode
from .kernel_lrkv import missing as missing_for_kernel

logger = logging.get_logger(__name__)
PATHS = ("auto", "rebuild", "split", "kernel")
# scores above which a CPU takes one row of the batch at a time: larger temporaries go back to the
# system at every step, and to
SCORES = 1 << 21
# get them again can cost as much as the step (32K tokens, batch 4: 85 or
# 185 ms, by the state of the heap; row by row always 85)
# queries per KV head up to which reading in place does less work than rebuilding (it grows with
# them, rebuilding does not)
SPLIT_QUERIES = 16


# --------------------------------------------------------------------------------------- the choice


def choose_path(
    asked: str,
    *,
    queries: int,
    tokens: int,
    implementation: str,
    mask,
    training: bool,
    cached: bool,
    device: torch.device,
    dtype: torch.dtype,
    outside_window: bool = False,
    differentiable: bool = False,
    kernel: bool = True,
) -> str:
    """Which path attends: "rebuild", "split" or "kernel".

    asked: one of PATHS. queries: G T per KV head; tokens: T; implementation: the attention function
    of the config; mask: None or what transformers made for that function; cached: whether there is
    a cache to read; outside_window: whether some of it lies outside a sliding window, which only
    eager and sdpa are told by their mask; differentiable: whether gradients are wanted, which the
    kernel has none of; kernel: whether the kernel can do what the family does to keys and scores
    (no soft cap, no norm but an RMS norm, not every kind of attention: `LrkvAttention.kernel`), and
    knows the form of keys, numbers or codes (`LowRankHeads.in_kernel`).
    Raises ValueError for a path that does not exist or cannot run here.
    """
    if asked not in PATHS:
        raise ValueError(f"config.lrkv_path is {asked!r}: it must be one of {', '.join(PATHS)}")
    missing = missing_for_kernel(device, dtype)
    if asked == "kernel" and missing:
        raise ValueError(f"config.lrkv_path is 'kernel', but {missing}")
    # flex attention has masks of its own
    readable = mask is None or isinstance(mask, torch.Tensor) and mask.dim() in (2, 4)
    # whether the mask says all that is not to be seen; paged attention keeps its cache to itself,
    # and functions of the user's own mean something
    complete = (
        implementation in ("eager", "sdpa")
        or implementation.startswith("flash")
        and tokens == 1
        and cached
        and not outside_window
    )
    if asked == "rebuild" or training or not readable or not complete:
        return "rebuild"
    if asked == "auto" and (not cached or queries > SPLIT_QUERIES):
        return "rebuild"
    one_mask = mask is None or mask.dim() == 2 or mask.shape[1] == 1
    # eager: its weights may be asked for
    wanted = (
        asked == "kernel" or asked == "auto" and device.type != "cpu" and implementation != "eager"
    )
    path = (
        "kernel"
        if wanted and not missing and kernel and tokens == 1 and one_mask and not differentiable
        else "split"
    )
    if device.type != "cpu" and not torch.compiler.is_compiling():
        logger.warning_once(
            f"LRKV decodes through the {path} path" + (f": {missing}" if missing else "")
        )
    return path


def eager_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs
):
    """Attention as plainly as transformers' models write it: query (N, H G, T, d), key and value
    (N, H, S, d), attention_mask None or numbers to add. Returns ((N, T, H G, d), weights (N, H G,
    T, S)).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (
        query.to(torch.float32) @ key.to(torch.float32).mT
        if module.float32_scores
        else query @ key.mT
    ) * scaling
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores if attention_mask is None else scores + attention_mask
    weights = nn.functional.dropout(
        scores.softmax(-1, dtype=torch.float32).to(value.dtype), p=dropout, training=module.training
    )
    return (weights @ value).transpose(1, 2).contiguous(), weights


def added_mask(
    mask: torch.Tensor | None, tokens: int, length: int, device: torch.device
) -> torch.Tensor | None:
    """A mask in any of transformers' forms -> float32 numbers to add to scores, (1 or N, 1 or H G,
    T, S), or None if nothing is masked.
    """
    # sdpa's "causal": the queries are the first tokens, what a static cache holds behind them is
    # empty
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return None
    # flash attention: which cached tokens are there, (N, S)
    if mask.dim() == 2:
        mask = mask[:, None, None, -length:].bool()
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32, device=device).masked_fill(
            ~mask, torch.finfo(torch.float32).min
        )
    return mask[..., :length].float()


# ---------------------------------------------------------------------------------------- attention


class LrkvAttention:
    """Mixin over a family's attention class: keys and values come from `LowRankHeads`, everything
    else stays the family's.
    """

    eager_attention = staticmethod(eager_attention)
    # whether the family multiplies queries and keys in float32,
    # whatever its dtype: they may be large
    float32_scores = False
    # kinds of attention in which the kernel can do what the family does to keys and scores
    kernel: tuple[str, ...] = ("self", "cross")
    kind = "self"  # of this module
    # whether the original computes its scores on its own, past transformers' attention interface
    attends_itself = False
    # whether what is cached may be codes
    takes_codes = True
    # whether the position embeddings that this module is handed have been looked at
    tables_checked = False

    def take_over(
        self,
        config,
        layer_idx: int,
        *projections: str,
        name: str = "lrkv",
        queries: str = "q_proj",
        **shape,
    ) -> None:
        """Put factored keys and values in the place of the projections called so: of keys and of
        values, or one that holds queries too, which then have a projection of their own. shape: D,
        H and d where the config does not say them (`low_rank_heads`).
        """
        replaced = [getattr(self, projection) for projection in projections]
        for projection in projections:
            delattr(self, projection)
        biased = [projection.bias is not None for projection in replaced]
        if len(projections) == 1:
            heads = (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            setattr(
                self,
                queries,
                nn.Linear(config.hidden_size, config.num_attention_heads * heads, bias=biased[0]),
            )
        self.keys = low_rank_heads(config, layer_idx, "keys", biased[0], name, **shape)
        self.values = low_rank_heads(config, layer_idx, "values", biased[-1], name, **shape)

    def key_norm(self):
        """What normalises keys (N, H, S, d) before rotation, or None."""
        return getattr(self, "k_norm", None) or getattr(self, "k_layernorm", None)

    def normalised(self, query: torch.Tensor) -> torch.Tensor:
        """Queries (N, H G, T, d) after their norm, if there is one."""
        norm = getattr(self, "q_norm", None) or getattr(self, "q_layernorm", None)
        return query if norm is None else norm(query)

    def kernel_norm(self):
        """The norm of keys as the kernel knows it, an RMS norm with one `weight` (d,) for all heads
        and `variance_epsilon`; None where it is another.
        """
        return

    def encode_keys(
        self, hidden_states: torch.Tensor, rotation: tuple | None, through: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states (N, T, D) -> what the cache is to hold of their keys, or where nothing is
        cached (`through`) the values of that.
        """
        return self.keys.encode(hidden_states, rotation, self.key_norm(), through)

    def heads_of(self, query: torch.Tensor) -> torch.Tensor:
        """(N, T, H G d) -> (N, H G, T, d)"""
        return query.view(*query.shape[:-1], -1, self.keys.head_dim).transpose(1, 2)

    def looked_at(self, position_embeddings, tokens: int, interleaved: bool = False) -> tuple:
        """(cos, sin) of these tokens as the model handed them on, their layout checked at the first
        call. Raises BrokenContract.
        """
        if position_embeddings is None or not (
            self.tables_checked or torch.compiler.is_compiling()
        ):
            check_tables(position_embeddings, tokens, self.keys.head_dim, interleaved)
            self.tables_checked = True
        return position_embeddings

    def factored_attention(
        self, query, hidden_states, attention_mask, cache, rotations=None, dropout=0.0, **kwargs
    ):
        """Attention of query (N, H G, T, d), before norm and rotation, to hidden_states (N, T, D)
        and what is cached.

        rotations: (cos, sin) of the queries and of all cached keys, or None. cache: a `Cache`, the
        paged one of continuous batching, or None. Returns ((N, T, H G d), weights or None).
        """
        of_queries, of_keys = rotations or (None, None)
        keys, values, query = (
            self.encode_keys(hidden_states, of_queries, cache is None),
            self.values.encode(hidden_states, through=cache is None),
            self.normalised(query),
        )
        query = query if rotations is None else rotate(query, of_queries)
        if cache is not None and not isinstance(cache, Cache):
            return self.attend_pages(
                query, keys, values, attention_mask, of_keys, cache, dropout, **kwargs
            )
        if cache is not None:
            keys, values = update_cache(
                cache, self.layer_idx, self.config.num_hidden_layers, keys, values
            )
            note_written(cache, attention_mask)
            if self.gradients_end(hidden_states, keys):
                keys = self.encode_keys(hidden_states, of_queries, True)
                values = self.values.encode(hidden_states, through=True)
        return self.attend(
            query, keys, values, attention_mask, of_keys, cache is not None, dropout, **kwargs
        )

    def attend(
        self, query, keys, values, attention_mask, rotation, cached: bool, dropout=0.0, **kwargs
    ):
        """Attention of queries (N, H G, T, d), ready to meet keys, to keys and values as
        `LowRankHeads.encode` gives them. rotation: (cos, sin) of all of them, or None. Returns ((N,
        T, H G d), weights or None).
        """
        implementation, T, window, norm = (
            self.config._attn_implementation,
            query.shape[2],
            kwargs.get("sliding_window"),
            self.key_norm(),
        )
        check_mask(attention_mask, query.shape[0], T, keys[0].shape[2])
        path = choose_path(
            self.config.lrkv_path,
            queries=T * query.shape[1] // self.keys.num_heads,
            tokens=T,
            implementation=implementation,
            mask=attention_mask,
            training=self.training,
            cached=cached,
            device=query.device,
            dtype=query.dtype,
            outside_window=bool(window) and keys[0].shape[2] > window,
            differentiable=self.wants_gradients(query, *keys, *values),
            kernel=self.keys.in_kernel
            and self.values.in_kernel
            and kwargs.get("softcap") is None
            and self.kind in self.kernel
            and (norm is None or self.kernel_norm() is not None),
        )
        if path == "rebuild":
            return self.attend_whole(
                query,
                self.keys.rebuild(keys, rotation, norm),
                self.values.rebuild(values),
                attention_mask,
                dropout,
                **kwargs,
            )
        output, weights = self.read_in_place(
            path,
            query,
            keys,
            values,
            attention_mask,
            rotation,
            kwargs.get("softcap"),
            implementation == "eager",
        )
        return output.reshape(query.shape[0], T, -1).contiguous(), weights

    def attend_whole(self, query, keys, values, attention_mask, dropout=0.0, **kwargs):
        """The attention function of the config on queries (N, H G, T, d), keys and values (N, H, S,
        d): ((N, T, H G d), weights or None).
        """
        function, (N, heads, T, _) = (
            ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, self.eager_attention
            ),
            query.shape,
        )
        if not torch.compiler.is_compiling():
            check_interface(function)
        output, weights = function(
            self,
            query,
            keys,
            values,
            attention_mask,
            dropout=dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        check_output(output, N, T, heads)
        return output.reshape(N, T, -1).contiguous(), weights

    def attend_pages(
        self, query, keys, values, attention_mask, rotation, pages, dropout=0.0, **kwargs
    ):
        """Continuous batching: the pages keep whole keys and values."""
        keys, values = (
            self.keys.rebuild(keys, rotation, self.key_norm()),
            self.values.rebuild(values),
        )
        if PAGED_IN_ATTENTION:
            keys, values = pages.update(
                key_states=keys, value_states=values, layer_idx=self.layer_idx, kwargs=kwargs
            )
        else:
            kwargs["cache"] = pages
        return self.attend_whole(query, keys, values, attention_mask, dropout, **kwargs)

    def wants_gradients(self, *tensors) -> bool:
        """Whether anything that decoding reads, or the maps it reads it with, is being
        differentiated.
        """
        return torch.is_grad_enabled() and any(
            t.requires_grad for t in (*tensors, *self.keys.parameters(), *self.values.parameters())
        )

    def gradients_end(self, states: torch.Tensor, keys: tuple) -> bool:
        """Whether gradients are wanted of what was made of states (N, T, D), all there is in the
        cache, and codes would end them: keys as cached. What is read back from codes is the same.
        """
        return (
            (self.keys.coded or self.values.coded)
            and torch.is_grad_enabled()
            and keys[0].shape[2] == states.shape[1]
            and (states.requires_grad or self.wants_gradients())
        )

    def read_in_place(
        self, path, query, keys, values, attention_mask, rotation, softcap=None, with_weights=False
    ):
        """Split or kernel path: query (N, H G, T, d), rotated; keys and values as cached. Returns
        ((N, T, H G, d), weights (N, H G, T, S) or None).
        """
        N, heads, T, d = query.shape
        length = keys[0].shape[2]
        grouped = query.reshape(N, self.keys.num_heads, -1, d)  # (N, H, G T, d)
        mask = added_mask(attention_mask, T, length, query.device)
        if path == "kernel":
            output = decode(
                self.keys,
                self.values,
                grouped,
                keys,
                values,
                rotation,
                mask,
                self.scaling,
                self.kernel_norm(),
            )
            return output.reshape(N, heads, T, d).transpose(1, 2), None
        if (
            N > 1
            and N * heads * T * length > SCORES
            and query.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            part = lambda t, n: t if t is None or len(t) == 1 else t[n : n + 1]
            rows = [
                self.read_in_place(
                    path,
                    query[n : n + 1],
                    *([part(t, n) for t in side] for side in (keys, values)),
                    part(mask, n),
                    None if rotation is None else [part(t, n) for t in rotation],
                    softcap,
                    with_weights,
                )
                for n in range(N)
            ]
            return torch.cat([output for output, _ in rows]), (
                torch.cat([weights for _, weights in rows]) if with_weights else None
            )
        exactly = (
            torch.promote_types(query.dtype, torch.float32) if self.float32_scores else query.dtype
        )
        scores = self.keys.scores(
            grouped.to(exactly) * self.scaling,
            keys,
            rotation,
            self.key_norm(),
        ).reshape(N, heads, T, -1)
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # (N, H G, T, S)
        # (N, H, G T, d)
        output = self.values.average(weights.reshape(N, self.keys.num_heads, -1, length), values)
        return output.reshape(N, heads, T, d).transpose(1, 2), weights if with_weights else None


class KernelNorm(NamedTuple):
    """A norm of keys as the kernel takes it (`LrkvAttention.kernel_norm`)."""

    weight: torch.Tensor  # (d,)
    variance_epsilon: float


def layer_kinds(config) -> list[str]:
    """The kind of each layer: layers of a kind have caches of a kind."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def rotations_in(cache, kind: str, device: torch.device) -> tuple | None:
    """The tables that a cache carries for layers of a kind (`LrkvModel.hands_on`), where the layer
    is.
    """
    found = getattr(cache, "lrkv_rotations", None)
    return (
        None
        if found is None
        else tuple(tuple(table.to(device) for table in side) for side in found[kind])
    )


def as_halves(rotation: tuple, interleaved: bool) -> tuple:
    """(cos, sin) (1 or N, T, n) in the half-split layout. interleaved: they come for neighbouring
    channels, each angle twice in a row; the channels themselves were reordered when the model was
    converted.
    """
    return (
        tuple(torch.cat((t[..., ::2], t[..., ::2]), dim=-1) for t in rotation)
        if interleaved
        else rotation
    )


def halves_of(angles: tuple) -> tuple:
    """(sin, cos) (1 or N, T, n/2), each angle once, as GPT-J and CodeGen have them -> (cos, sin) (1
    or N, T, n) in the half-split layout.
    """
    sin, cos = angles
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


class LrkvRotaryAttention(LrkvAttention):
    """Forward for Llama-shaped attention (q_proj, o_proj, RoPE). Differs from the parent: no k_proj
    and v_proj, keys cached before RoPE.
    """

    # whether the model's tables of angles come for neighbouring channels, each angle twice in a row
    tables_interleaved = False
    rotates = True  # whether this module's keys are turned: some layers may go without RoPE
    projections: tuple[str, ...] = ("k_proj", "v_proj")  # those that are replaced
    output = "o_proj"

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.take_over(config, layer_idx, *self.projections)

    def extra_arguments(self) -> dict:
        """Extra arguments of the family's attention call: its sliding window, its soft cap."""
        return {}

    def rotations(self, hidden_states, given, of_kinds, cache) -> tuple:
        """(cos, sin) of the queries and of all cached keys. given: the model's own of these tokens;
        of_kinds: those of the cache by kind of layer, or None where the cache carries them.
        """
        kind = layer_kinds(self.config)[self.layer_idx]
        found = (
            rotations_in(cache, kind, hidden_states.device) if of_kinds is None else of_kinds[kind]
        )
        if found is not None:
            return found
        # keys that lie rotated in the cache keep the positions they were given
        tables = self.looked_at(given, hidden_states.shape[1], self.tables_interleaved)
        return (as_halves(tables, self.tables_interleaved),) * 2

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        lrkv_rotations=None,
        **kwargs,
    ):
        cache, rotations = take_cache(kwargs), None
        if self.rotates:
            rotations = self.rotations(hidden_states, position_embeddings, lrkv_rotations, cache)
        dropout = (
            self.attention_dropout.p
            if isinstance(self.attention_dropout, nn.Module)
            else self.attention_dropout
        )
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            rotations,
            dropout,
            **self.extra_arguments(),
            **kwargs,
        )
        return getattr(self, self.output)(output), weights


class LrkvNeighbourAttention(LrkvAttention):
    """Forward for attention as in GPT-J and CodeGen: RoPE on a part of each head, and on
    neighbouring channels, which were reordered when the model was converted; scores in float32. The
    table of angles is the module's own; since transformers 5.24 it is the model's, and what it says
    is handed on.
    """

    float32_scores, kernel = True, ()
    tables_interleaved = False  # `halves_of` gives them for halves
    projections: tuple[str, ...]

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.scaling = config, self.head_dim**-0.5
        self.take_over(config, layer_idx, *self.projections)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) (N, T, rotary_dim) of positions (N, T)."""
        return halves_of(self.embed_positions.to(positions.device)[positions].chunk(2, dim=-1))

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        position_ids=None,
        **kwargs,
    ):
        cache = take_cache(kwargs)
        rotations = rotations_in(cache, "full_attention", hidden_states.device)
        if rotations is None:
            given = (
                self.rotation(position_ids)
                if position_embeddings is None
                else halves_of(position_embeddings)
            )
            rotations = (self.looked_at(given, hidden_states.shape[1]),) * 2
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            rotations,
            self.config.attn_pdrop,
        )
        return self.resid_dropout(self.out_proj(output)), weights
