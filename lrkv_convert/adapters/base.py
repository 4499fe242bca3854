"""What the mathematics needs to know of a family, and nothing else: where the attention weights lie and how they are laid out.

Shapes: H KV heads, G query heads per KV head, D model width, d head width. All matrices here act on row vectors: q = x W_Q + b_Q.
"""
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Attention shapes of a model, and what may be done to its keys."""

    layers: int
    width: int          # D
    kv_heads: int       # H
    groups: int         # G
    head_dim: int       # d
    rotary: bool        # RoPE on the whole head: only rotations of frequency pairs may pass between W_Q and W_K


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, per head. Biases are None where the family has none."""

    W_Q: Tensor                 # (H, G, D, d)
    W_K: Tensor                 # (H, D, d)
    W_V: Tensor                 # (H, D, d)
    W_O: Tensor                 # (H, G, d, D)
    b_Q: Tensor | None = None   # (H, G, d)
    b_K: Tensor | None = None   # (H, d)
    b_V: Tensor | None = None   # (H, d)

    def to(self, *args, **kwargs) -> "AttentionWeights":
        return AttentionWeights(**{k: v if v is None else v.to(*args, **kwargs) for k, v in vars(self).items()})

    def replace(self, **changes) -> "AttentionWeights":
        return replace(self, **changes)


class Adapter(ABC):
    """Locations and layouts of one family. Subclasses fill in the fields and the two directions `split` and `join`."""

    model_type: str             # of the original, e.g. "llama"
    modeling: str               # module in lrkv_convert.modeling that travels with the output
    prefix: str                 # of the base model's tensors in the checkpoint, e.g. "model."
    layer_path: str             # path of the decoder layers in the model, e.g. "model.layers"
    attention: str              # name of the attention module in a layer, e.g. "self_attn"
    output: str                 # name of the output projection in the attention module, e.g. "o_proj"
    key_projection: str         # name of the module whose output holds the keys, e.g. "k_proj"

    @abstractmethod
    def geometry(self, config) -> Geometry:
        """Shapes of the model's attention."""

    def refuse(self, config) -> None:
        """Raise LrkvError for variants of the family that cannot be converted exactly."""

    def module(self, layer: int) -> str:
        """Checkpoint prefix of a layer's attention, e.g. "model.layers.3.self_attn."."""
        return f"{self.layer_path}.{layer}.{self.attention}."

    def key_columns(self, geometry: Geometry) -> slice:
        """Which columns of the key projection's output are keys, heads in order."""
        return slice(None)

    @abstractmethod
    def split(self, read, layer: int, config) -> AttentionWeights:
        """Per-head weights of a layer; `read(name)` gives a tensor of the checkpoint."""

    @abstractmethod
    def join(self, weights: AttentionWeights) -> dict[str, Tensor]:
        """The query and output tensors of the converted attention module, by their names inside it (keys and values are the factors')."""

    @abstractmethod
    def queries(self, tensors: dict[str, Tensor], geometry: Geometry) -> Tensor:
        """W_Q (H, G, D, d) out of a converted attention module's tensors: what `join` put there."""


def heads(weight: Tensor, *shape: int) -> Tensor:
    """(D, n d) -> (*shape, D, d) with prod(shape) = n: cut the columns into heads."""
    D, columns = weight.shape
    count = torch.Size(shape).numel()
    return weight.view(D, count, columns // count).transpose(0, 1).reshape(*shape, D, columns // count)
