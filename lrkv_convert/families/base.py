"""What the mathematics needs to know of a family, and nothing else: where the attention weights lie
and how they are laid out.

Shapes: H KV heads, G query heads per KV head, D model width, d head width. All matrices here act on
row vectors: q = x W_Q + b_Q.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import LrkvError

KINDS = ("self", "cross")  # of decoder attention


@dataclass(frozen=True)
class Geometry:
    """Shapes of one attention module, and what may be done to its keys."""

    width: int  # D
    kv_heads: int  # H
    groups: int  # G
    head_dim: int  # d
    # leading channels of a head that RoPE turns, in pairs (i, i + rotary_dim / 2); 0 without RoPE
    rotary_dim: int = 0
    # keys are normalised after their projection (QK-norm): nothing may pass between W_Q and W_K
    key_norm: bool = False

    @property
    def rotary(self) -> bool:
        """Whether RoPE turns any of a key: what it turns lets only rotations of frequency pairs
        pass between W_Q and W_K.
        """
        return self.rotary_dim > 0

    @property
    def rebuilt(self) -> bool:
        """Whether a cached key must be rebuilt before it is read."""
        return self.rotary or self.key_norm


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, per head. Biases are None where the family has none."""

    W_Q: Tensor  # (H, G, D, d)
    W_K: Tensor  # (H, D, d)
    W_V: Tensor  # (H, D, d)
    W_O: Tensor  # (H, G, d, D)
    b_Q: Tensor | None = None  # (H, G, d)
    b_K: Tensor | None = None  # (H, d)
    b_V: Tensor | None = None  # (H, d)

    def to(self, *args, **kwargs) -> "AttentionWeights":
        moved: dict[str, Any] = {
            k: v if v is None else v.to(*args, **kwargs) for k, v in vars(self).items()
        }
        return AttentionWeights(**moved)

    def replace(self, **changes) -> "AttentionWeights":
        return replace(self, **changes)


class Adapter(ABC):
    """Locations and layouts of one family. Subclasses fill in the fields and the two directions
    `split` and `join`.
    """

    model_type: str  # of the original, e.g. "llama"
    prefix: str  # of the base model's tensors in the checkpoint, e.g. "model."
    layer_path: str  # path of the decoder layers in the model, e.g. "model.layers"
    attention: str  # name of the attention module in a layer, e.g. "self_attn"
    # name of the output projection in the attention module, e.g. "o_proj"
    output: str
    # names of the projections in the attention module: queries, keys and values, or all in one
    projections: tuple[str, ...]
    query: str  # name of the query projection in the converted module, e.g. "q_proj"
    key_projection: str  # name of the module whose output holds the keys, e.g. "k_proj"
    tuples: bool  # whether the original's layers give their hidden states in tuples
    models: str  # for the README: some that people know
    positions: str  # in words, for the README: "RoPE", "ALiBi", ...
    norms: str  # the same of what normalises keys and queries

    @abstractmethod
    def layers(self, config) -> int:
        """How many layers the stack has that this attention stands in."""

    @abstractmethod
    def geometry(self, config, layer: int = 0) -> Geometry:
        """Shapes of the attention of a layer."""

    def attends(self, config, layer: int) -> bool:
        """Whether this layer has such attention: hybrids have layers without."""
        return True

    def refuse(self, config) -> None:  # noqa: B027  (most refuse nothing)
        """Raise LrkvError for variants of the family that cannot be converted exactly."""

    def module(self, layer: int) -> str:
        """Checkpoint prefix of a layer's attention, e.g. "model.layers.3.self_attn."."""
        return f"{self.layer_path}.{layer}.{self.attention}."

    @abstractmethod
    def keys(self, projected: Tensor, config) -> Tensor:
        """Keys (T, H, d) out of what the key projection gives, (T, n): heads and channels in the
        order of `split`.
        """

    def stored(self, tensors: dict) -> dict:
        """A checkpoint's tensors under the names and in the shapes of transformers' model, where
        the two differ.
        """
        return tensors

    @abstractmethod
    def rest(self, checkpoint, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's attention module beside what `split` reads, norms and the
        output's bias, as the converted module is to have them.
        """

    def layer_arguments(self, arguments: dict) -> dict:
        """The keyword arguments of an original layer, as calibration is to call it."""
        return arguments

    @abstractmethod
    def split(self, read, layer: int, config) -> AttentionWeights:
        """Per-head weights of a layer; `read(name)` gives a tensor of the checkpoint."""

    @abstractmethod
    def join(self, weights: AttentionWeights) -> dict[str, Tensor]:
        """The query and output tensors of the converted attention module, by their names inside it
        (keys and values are the factors').
        """

    @abstractmethod
    def queries(self, tensors: dict[str, Tensor], geometry: Geometry) -> Tensor:
        """W_Q (H, G, D, d) out of a converted attention module's tensors: what `join` put there."""


@dataclass(frozen=True)
class Site:
    """One attention module to convert: what a plan, a fit and a record speak of.

    layer: its layer in the stack; kind: "self" or "cross"; path: of the module in the model, e.g.
    "model.layers.3.self_attn"; adapter: where its weights lie; geometry: its own shapes.
    """

    layer: int
    kind: str
    path: str
    adapter: Adapter
    geometry: Geometry

    @property
    def name(self) -> str:
        """What a store calls it."""
        return f"{self.kind}-{self.layer}"


@dataclass(frozen=True)
class Encoder:
    """What stands before the decoder of an encoder-decoder.

    path: of the encoder in the model; decoder: of the decoder; layers: name of the layers in
    either; speech: whether the encoder reads sound; relative: whether the first layer's attention
    makes a position bias that the others are handed (and layers give tuples); mask: what attention
    calls what it is to add to its scores.
    """

    path: str
    decoder: str
    layers: str
    speech: bool = False
    relative: bool = False
    mask: str = "attention_mask"


@dataclass(frozen=True)
class Family:
    """The attention of a family by kind, in the order of KINDS, and what its decoder reads beside.

    encoder: None for a decoder on its own.
    """

    kinds: dict[str, Adapter]
    encoder: Encoder | None = None

    @property
    def any(self) -> Adapter:
        """One of the kinds, for what all have."""
        return next(iter(self.kinds.values()))

    @property
    def model_type(self) -> str:
        return self.any.model_type

    @property
    def speech(self) -> bool:
        """Whether it reads sound."""
        return self.encoder is not None and self.encoder.speech

    def layers(self, config) -> int:
        """How many layers its decoder has."""
        return self.any.layers(config)

    def sites(self, config, kinds: Collection[str] | None = None) -> list[Site]:
        """Every attention module of these kinds (default: all), layer by layer."""
        wanted = {kind: a for kind, a in self.kinds.items() if kinds is None or kind in kinds}
        return [
            Site(i, kind, adapter.module(i).rstrip("."), adapter, adapter.geometry(config, i))
            for i in range(self.layers(config))
            for kind, adapter in wanted.items()
            if adapter.attends(config, i)
        ]

    def refuse(self, config) -> None:
        """Raise LrkvError for variants that cannot be converted exactly."""
        if self.encoder is not None and not config.is_encoder_decoder:
            raise LrkvError(
                f"this {config.model_type} is a decoder on its own",
                "whole encoder-decoders are supported",
            )
        for adapter in self.kinds.values():
            adapter.refuse(config)


def by_kind(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites of each kind of attention, in their order."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.kind, []).append(site)
    return found
