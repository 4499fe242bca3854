"""Mixins over the families' own models, which put the attention of attention_lrkv.py into them.
Travels with every converted checkpoint.

This file may import torch, transformers and its siblings only.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .attention_lrkv import as_halves, halves_of, layer_kinds
from .cache_lrkv import pair_count, with_pairs
from .contract_lrkv import Written, cache_argument, parameters, require_arguments, take_cache
from .factors_lrkv import LowRankHeads
from .forms_lrkv import FORMS

logger = logging.get_logger(__name__)


class LrkvPreTrained:
    """Mixin over a family's PreTrainedModel: how the factors start when a model is built from its
    config alone, and what batching costs.
    """

    def init_continuous_batching(self, *args, **kwargs):
        logger.warning_once(
            "continuous batching keeps whole keys and values in its pages: an LRKV model generates"
            " the same there, but its cache is as large as the original's (`generate` and a server"
            " without continuous batching have the small one)"
        )
        return super().init_continuous_batching(*args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LowRankHeads):
            module.reset_parameters()


class LrkvCausal(LrkvPreTrained):
    """Mixin over a family's causal LM: its base model is the one with LRKV attention,
    `base_class`.
    """

    base_class: type

    def __init__(self, config):
        with no_init_weights():  # of the family's own base model, which goes again
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.post_init()


class LrkvModel(LrkvPreTrained):
    """Mixin over a family's decoder: swaps the attention modules in, and prepares any cache it is
    given.
    """

    attention_class: type
    attention_name = "self_attn"
    # whether keyword arguments reach the attention modules; where they do not, the cache carries
    # them
    hands_on = True

    def __init__(self, config):
        super().__init__(config)
        self.cache_pairs = []
        for layer_idx, layer in enumerate(self.decoder_layers()):
            parent, _, name = self.attention_name.rpartition(".")
            attention = self.attention_class(config, layer_idx)
            setattr(layer.get_submodule(parent), name, attention)
            self.cache_pairs.append(pair_count(attention.keys, attention.values))
        require_arguments(self.attention_class, isinstance(self, LrkvRotaryModel))
        self.given_as, self.arguments = cache_argument(super().forward), parameters(super().forward)
        self.post_init()

    def decoder_layers(self):
        return self.layers

    def forward(self, *given, use_cache=None, **kwargs):
        kwargs.update(zip(self.arguments, given))  # as the family's own forward takes them
        cache, input_ids, inputs_embeds = (
            take_cache(kwargs),
            kwargs.pop("input_ids", None),
            kwargs.get("inputs_embeds"),
        )
        if use_cache is None and cache is None:
            use_cache = self.config.use_cache
        if use_cache and cache is None and not (self.training and self.gradient_checkpointing):
            cache = DynamicCache(config=self.config)
        written = None
        if isinstance(cache, Cache):
            with_pairs(cache, self.cache_pairs)
            arguments = self.cache_arguments(input_ids, inputs_embeds, cache, kwargs)
            if self.hands_on:
                kwargs.update(arguments)
            else:
                cache.lrkv_rotations = arguments.get("lrkv_rotations")
            # there, whole layers may be dropped, and checkpointing drops the cache
            if not self.training:
                tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
                written = Written(
                    cache,
                    self.config.num_hidden_layers,
                    tokens,
                    kwargs.get("attention_mask"),
                    self.config._attn_implementation,
                )
        output = super().forward(input_ids, **{self.given_as: cache}, use_cache=use_cache, **kwargs)
        if written is not None:
            written.check()
        return output

    def cache_arguments(self, input_ids, inputs_embeds, cache, given) -> dict:
        """What the attention modules must know of the cache, as keyword arguments."""
        return {}


class LrkvRotaryModel(LrkvModel):
    """Keys lie in the cache unrotated, so each step rotates all of them, by their index in the
    cache.

    RoPE scores depend on differences of positions only, and the tokens of a row are consecutive, so
    the index serves as the position even under left padding, as long as the queries are rotated by
    their index too. While the cache is empty, the positions given hold, unless the cache is to keep
    a rotated base, to which residuals rotated by their index will be added.

    Codes that are made after rotation are rounded another way at another position, so those of a
    padded row are to be what they are without padding: the index counts from its first token then.
    """

    def cache_arguments(self, input_ids, inputs_embeds, cache, given) -> dict:
        form = FORMS[self.config.lrkv["keys"].get("form", "joint")]
        if not form.rotates_on_read:
            return {}
        x = inputs_embeds if inputs_embeds is not None else self.get_input_embeddings().weight
        T = (inputs_embeds if inputs_embeds is not None else input_ids).shape[1]
        check_consecutive(
            cache,
            T,
            given.get("position_ids"),
            given.get("attention_mask"),
            at_once=form.caches_rotated,
        )
        kinds = layer_kinds(self.config)
        # kind: (length, offset)
        sizes = {kind: cache.get_mask_sizes(T, kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        if not form.caches_rotated and all(
            length == T and offset == 0 for length, offset in sizes.values()
        ):
            return {}
        held, first = cache.get_seq_length(), 0
        given_positions = given.get("position_ids")
        if (
            form.caches_rotated
            and given_positions is not None
            and self.config.lrkv["keys"].get("codes")
        ):
            first = given_positions[:, -1:] - (held + T - 1)  # (1 or N, 1)
        # what a static cache has not filled yet is masked, and must not seem to be a longer text:
        # some RoPE variants change with the length
        positions = lambda start, length: (
            (torch.arange(length, device=x.device) + start).clamp(max=held + T - 1).unsqueeze(0)
            + first
        )
        rotation = lambda kind, start, length: as_halves(
            self.rotation(x, positions(start, length), kind),
            self.attention_class.tables_interleaved,
        )
        return {
            "lrkv_rotations": {
                kind: (rotation(kind, held, T), rotation(kind, offset, length))
                for kind, (length, offset) in sizes.items()
            }
        }

    def rotation(self, x, positions, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions (1, T), in the dtype and on the device of x, for layers of a
        kind.
        """
        return self.rotary_emb(x, positions)


GAPS = (
    "the tokens in this cache are not consecutive: the attention mask hides some between others (or"
    " behind the last), or the positions leave some out. Keys lie there unrotated and are rotated"
    " by their index, which would give other scores than the original's: leave such tokens out, pad"
    " on the left, generate with use_cache=False, or convert with --keys full"
)

NOWHERE = 1 << 40  # by how much a row is moved of which nothing is seen


def check_consecutive(cache, T: int, positions, mask, at_once: bool) -> None:
    """Raise ValueError where T tokens at these positions are to go on from a cache whose visible
    tokens have others than their index, moved by the same for a row. Looked at where a cache begins
    and where it is first gone on with: looking may wait for the device. at_once: not only where it
    is gone on with.
    """
    if torch.compiler.is_compiling():
        if isinstance(getattr(cache, "lrkv_moved", None), str):
            raise ValueError(GAPS)
        return
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return
    # by how much, (N, 1); "gaps"; None: it was looked at; ...: never
    known = getattr(cache, "lrkv_moved", ...)
    if known is None and T == 1 or positions.device.type == "meta":
        return
    held = int(cache.get_seq_length())
    moved = positions - (held + torch.arange(T, device=positions.device))  # (1 or N, T)
    if held == 0:
        cache.lrkv_moved = None
        if (
            mask is None
            or isinstance(mask, torch.Tensor)
            and mask.dim() == 2
            and mask.shape[1] >= T
        ):
            hidden = (
                torch.zeros(1, T, device=moved.device)
                if mask is None
                else mask[:, :T].to(moved.device) == 0
            )
            least = moved.masked_fill(hidden.bool(), NOWHERE).amin(dim=1, keepdim=True)
            most = moved.masked_fill(hidden.bool(), -NOWHERE).amax(dim=1, keepdim=True)
            cache.lrkv_moved = "gaps" if bool((least < most).any()) else least
        if not (at_once and isinstance(cache.lrkv_moved, str)):
            return
    elif isinstance(known, torch.Tensor):
        cache.lrkv_moved = None
        known, now = known.to(moved.device), moved[:, :1]
        if (
            len(known) not in (1, len(now))
            and len(now) != 1
            or bool((known.eq(now) | known.eq(NOWHERE)).all())
        ):
            return
    elif known != "gaps":
        return
    raise ValueError(GAPS)


class LrkvNeighbourModel(LrkvRotaryModel):
    """The decoder of such attention modules."""

    attention_name = "attn"
    hands_on = False

    def decoder_layers(self):
        return self.h

    def rotation(self, x, positions, kind):
        if hasattr(self, "rotary_emb"):  # transformers 5.24
            return halves_of(self.rotary_emb(x, positions))
        return self.h[0].attn.rotation(positions)
