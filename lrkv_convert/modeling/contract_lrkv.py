"""What the modelling files take for granted of transformers, in one place, and checked. Travels
with every converted checkpoint.

A converted model swaps attention modules and cache layers inside transformers' own models, so it
depends on more than their public interface. A release that changes one of these contracts must be
refused in one line, never answered with wrong numbers: that happened once, when 5.24 renamed the
argument that hands a cache on. What is relied upon, where, and in which releases it was seen:

    what                                  where, seen in               checked by

    the cache comes as `cache`            everywhere, 5.24             `cache_argument`, `Written`
    as `past_key_values`, in some         everywhere, 5.17-5.24        `cache_argument`, `Written`
    attention as `layer_past`
    attention is handed `attention_mask`  attention_lrkv, 5.17-5.24    `require_arguments`,
    (T5: `mask`): None, (N, S),                                        `check_mask`, `Written`
    (N, 1 or H, T, S), or a mask of
    flex attention
    under RoPE `position_embeddings`      attention_lrkv, 5.17-5.24    `require_arguments`,
    (cos, sin), each (1 or N, T, n),                                   `check_tables`
    one half of the channels as the
    other (Cohere: neighbours alike;
    GPT-J, CodeGen since 5.24: (sin,
    cos), n/2 wide)
    attention functions take (module,     attention_lrkv, 5.17-5.24    `check_interface`,
    query, key, value, attention_mask),                                `check_output`
    `scaling` and `dropout`; they give
    ((N, T, heads, d), weights)
    ALL_ATTENTION_FUNCTIONS               attention_lrkv, 5.17-5.24    (missing: an error)
    .get_interface
    paged caches are updated by           attention_lrkv, 5.17-5.24    `PAGED_IN_ATTENTION`
    attention (5.24), by its function
    (before)
    Cache.layers, .offloading,            cache_lrkv, 5.17-5.24        `Written`
    .layer_class_to_replicate; of a
    layer .keys, .values,
    .is_initialized, .prefetch; of a
    quantised one .q_group_size,
    ._quantize
    initialization.no_init_weights,       models_lrkv, 5.17-5.24       (missing: an error)
    PreTrainedModel._init_weights
    MODEL_FOR_SPEECH_SEQ_2_SEQ_           whisper, 5.17-5.24           (missing: an error)
    MAPPING_NAMES

This file may import torch and transformers only.
"""

import inspect
from functools import cache as once

import torch
import transformers
from packaging.version import Version
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)
# the oldest and the newest release of transformers that the tests were run with
TESTED = ("5.17.0", "5.24.0")
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
MASK_NAMES = ("attention_mask", "mask")
POSITION_NAMES = ("position_embeddings", "position_ids")


class BrokenContract(RuntimeError):
    """This release of transformers calls the model in a way that would give wrong numbers."""

    def __init__(self, what: str):
        super().__init__(
            f"transformers {transformers.__version__} {what}, so this LRKV model would give wrong"
            f" numbers: its files were tested with {TESTED[0]} to {TESTED[1]}. Install one of"
            " those, or write the folder's files anew with a newer lrkv-convert (lrkv refresh)"
        )


def newer() -> str | None:
    """What to say under a release newer than any these files were tested with; None under
    others.
    """
    if Version(transformers.__version__).release <= Version(TESTED[1]).release:
        return None
    return (
        f"LRKV modelling files were tested with transformers {TESTED[0]} to {TESTED[1]}, and this"
        f" is {transformers.__version__}: what they cannot rely on any more they refuse; compare"
        " cached with uncached logits once (use_cache=False), or look for a newer lrkv-convert"
    )


def say_if_newer() -> None:
    """Warn of it, once."""
    if (note := newer()) is not None:
        logger.warning_once(note)


# -------------------------------------------------------------------------------------------- names


@once
def parameters(function) -> tuple[str, ...]:
    """Names of a function's parameters, through its decorators."""
    return tuple(inspect.signature(function).parameters)


def cache_argument(forward) -> str:
    """The name under which a model's `forward` takes its cache. Raises BrokenContract."""
    for name in CACHE_NAMES:
        if name in parameters(forward):
            return name
    raise BrokenContract(f"has no known name for the cache in {forward.__qualname__}")


CACHE = cache_argument(create_causal_mask)  # what this release's own models call it
# whether attention modules update a paged cache; before 5.24 their functions did
PAGED_IN_ATTENTION = CACHE == "cache"


def take_cache(arguments: dict):
    """Remove the cache from keyword arguments, whatever it is called there; None if there is none.
    The paged cache of continuous batching is no `Cache`.
    """
    given = [arguments.pop(name, None) for name in CACHE_NAMES]
    found = [cache for cache in given if cache is not None]
    if any(cache is not found[0] for cache in found):
        raise ValueError(
            "two different caches were given, as"
            f" {' and '.join(name for name, cache in zip(CACHE_NAMES, given) if cache is not None)}"
        )
    return found[0] if found else None


def require_arguments(attention: type, rotary: bool) -> None:
    """Raise BrokenContract unless the family's attention, of which this class is a subclass, still
    takes what it is to be handed.
    """
    family = next(
        cls
        for cls in attention.__mro__
        if cls.__module__.startswith("transformers.") and "forward" in vars(cls)
    )
    for names, what in (
        (CACHE_NAMES, "cache"),
        (MASK_NAMES, "mask"),
        *(((POSITION_NAMES, "positions"),) if rotary else ()),
    ):
        if not set(names) & set(parameters(family.forward)):
            raise BrokenContract(f"hands no {what} to {family.__name__} that these files know")


# ------------------------------------------------------------------------------------------- shapes


def check_mask(mask, N: int, T: int, S: int) -> None:
    """A mask for T queries of N rows that see S keys: nothing, something of flex attention's, or
    (N, at least S), or (1 or N, heads, 1 or T, at least S).
    """
    if not isinstance(mask, torch.Tensor):
        if isinstance(mask, (dict, tuple, list)):
            raise BrokenContract(f"hands attention a {type(mask).__name__} for a mask")
        return
    fits = (
        mask.dim() in (2, 4)
        and len(mask) in (1, N)
        and mask.shape[-1] >= S
        and (mask.dim() == 2 or mask.shape[2] in (1, T))
    )
    if not fits or mask.dim() == 4 and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise BrokenContract(
            f"hands attention a mask {tuple(mask.shape)} of {mask.dtype} for {T} queries and {S}"
            f" keys of {N} rows"
        )


def check_tables(rotation: tuple | None, T: int, head_dim: int, interleaved: bool) -> None:
    """(cos, sin) for T tokens, in the layout that the family's keys were converted for."""
    if rotation is None:
        raise BrokenContract("hands attention no position embeddings")
    if not (
        isinstance(rotation, (tuple, list))
        and len(rotation) == 2
        and all(isinstance(t, torch.Tensor) and t.dim() == 3 for t in rotation)
    ):
        raise BrokenContract("hands attention position embeddings that are no pair of cos and sin")
    for table in rotation:
        n = table.shape[-1]
        one, two = (
            (table[..., ::2], table[..., 1::2])
            if interleaved
            else (table[..., : n // 2], table[..., n // 2 :])
        )
        if n % 2 or n > head_dim or table.shape[1] != T or not torch.equal(one, two):
            raise BrokenContract(
                f"hands attention position embeddings {tuple(table.shape)} of another layout for"
                f" {T} tokens and heads of {head_dim}"
            )


@once
def check_interface(function) -> None:
    """An attention function of transformers' own takes what it is handed by those names; one of the
    user's may do as it likes.
    """
    if not function.__module__.startswith("transformers."):
        return
    names = parameters(function)
    if names[:5] != ("module", "query", "key", "value", "attention_mask") or "scaling" not in names:
        raise BrokenContract(f"takes ({', '.join(names)}) in {function.__name__}")


def check_output(output: torch.Tensor, N: int, T: int, heads: int) -> None:
    """What an attention function gives: (N, T, heads, d)."""
    if output.shape[:-1] != (N, T, heads):
        raise BrokenContract(
            f"gives {tuple(output.shape)} for attention of {heads} heads in {N} rows of {T} tokens"
        )


# ---------------------------------------------------------------------------- the cache was written


class Written:
    """Watches one forward pass with a cache: every layer must have been extended by the tokens that
    were given, once, and must have been handed the mask where one matters.

    Each pass costs a flag on the cache. Lengths of all layers are compared at the first pass with a
    cache that is not being compiled (reading them may wait for the device); the flag alone is a
    constant while compiling.
    """

    def __init__(self, cache: Cache, layers: int, tokens: int, mask, implementation: str):
        self.cache, self.layers, self.tokens = cache, layers, tokens
        self.first = not torch.compiler.is_compiling() and not getattr(cache, "lrkv_checked", False)
        self.before = [self.length(i) for i in range(layers)] if self.first else None
        cache.lrkv_written = False
        cache.lrkv_needs_mask = (
            self.first
            and tokens > 1
            and (
                implementation == "eager"
                or implementation == "sdpa"
                and self.before[0] > 0
                or hides(mask)
            )
        )

    def length(self, layer: int) -> int:
        return int(self.cache.get_seq_length(layer))

    def check(self) -> None:
        """After the pass. Raises BrokenContract."""
        if not self.cache.lrkv_written:
            raise BrokenContract("did not hand the cache on to attention")
        if self.first:
            for i in range(self.layers):
                if self.length(i) != self.before[i] + self.tokens:
                    raise BrokenContract(
                        f"gave layer {i} of the cache {self.length(i) - self.before[i]} tokens of"
                        f" {self.tokens}"
                    )
            self.cache.lrkv_checked, self.cache.lrkv_needs_mask = True, False


def hides(mask) -> bool:
    """Whether a mask as users give it, (N, S), hides anything."""
    return (
        isinstance(mask, torch.Tensor)
        and mask.dim() == 2
        and mask.device.type != "meta"
        and not bool(mask.all())
    )


def note_written(cache: Cache, mask) -> None:
    """Attention has extended the cache, and was handed this mask."""
    cache.lrkv_written = True
    if mask is None and getattr(cache, "lrkv_needs_mask", False):
        raise BrokenContract("hands attention no mask where one is needed")


say_if_newer()
