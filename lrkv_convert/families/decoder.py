"""One adapter for every decoder: what differs between families is a handful of facts (families.py).

Query, key and value come out of one projection each, or of a fused one; in both cases a table of
rows says which output channel belongs to which head. Families whose RoPE turns neighbouring
channels (2i, 2i + 1) have the channels of queries and keys reordered to the half-split layout, (i,
i + rotary_dim / 2), which leaves every score as it was: the converted model knows one layout only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry

# buffers that old checkpoints hold beside the weights
MASKS = ("bias", "masked_bias", "rotary_emb")
# output channels of queries (H, G, d), keys (H, d), values (H, d)
Rows = tuple[Tensor, Tensor, Tensor]


class Refusal(NamedTuple):
    """A variant of a family that could not be converted exactly. what: in words; when: a function
    of the config; hint: what to do instead.
    """

    what: str
    when: Callable
    hint: str


def separate(g: Geometry) -> Rows:
    """A projection each."""
    q, kv = (
        torch.arange(g.kv_heads * g.groups * g.head_dim),
        torch.arange(g.kv_heads * g.head_dim).view(g.kv_heads, g.head_dim),
    )
    return q.view(g.kv_heads, g.groups, g.head_dim), kv, kv


def by_kind(g: Geometry) -> Rows:
    """Fused: all queries, all keys, all values."""
    q, k, v = separate(g)
    return q, k + q.numel(), v + q.numel() + k.numel()


def by_head(g: Geometry) -> Rows:
    """Fused: per KV head its queries, its key, its value."""
    rows = torch.arange(g.kv_heads * (g.groups + 2) * g.head_dim).view(
        g.kv_heads, g.groups + 2, g.head_dim
    )
    return rows[:, :-2], rows[:, -2], rows[:, -1]


def in_quarters(g: Geometry) -> Rows:
    """Fused: four blocks, each with a quarter of the queries, of the values, of the keys (CodeGen,
    which was trained on four devices).
    """
    q, v, k = torch.arange(3 * g.kv_heads * g.head_dim).view(4, 3, -1).unbind(1)
    return (
        q.reshape(g.kv_heads, 1, g.head_dim),
        k.reshape(g.kv_heads, g.head_dim),
        v.reshape(g.kv_heads, g.head_dim),
    )


def half_split(head_dim: int, rotary_dim: int) -> Tensor:
    """Where the channels of a head come from when those that RoPE turns as neighbours are to be
    turned as halves, (d,).
    """
    return torch.cat(
        (
            torch.arange(rotary_dim).reshape(rotary_dim // 2, 2).T.flatten(),
            torch.arange(rotary_dim, head_dim),
        )
    )


class DecoderAdapter(Adapter):
    """A decoder family.

    model_type: as in config.json; prefix, layers, attention, output: where things are (`Adapter`);
    projections: names of those of queries, keys and values, or of the one that holds all three;
    layout: its rows; query: name of the queries' projection in the converted module; transposed:
    weights are (in, out), as in Conv1D; biased: whether queries, keys and values have biases, or
    which of "qkv"; rotary: how many channels of a head of width d RoPE turns; rotates: whether it
    does so in this layer; interleaved: whether as neighbours; key_norm: whether there is QK-norm;
    kv_heads: how many (default: as many as the config says); norm_weights: names of QK-norms with a
    weight per head and channel; stored, arguments: see `Adapter.stored` and `layer_arguments`;
    refuses: what of the family cannot be exact; tuples, models, positions, norms: see
    `Adapter`. The functions take the config.
    """

    def __init__(
        self,
        model_type: str,
        *,
        prefix: str = "model.",
        layers: str = "model.layers",
        attention: str = "self_attn",
        output: str = "o_proj",
        projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
        layout: Callable[[Geometry], Rows] = separate,
        query: str = "q_proj",
        transposed: bool = False,
        biased: Callable = lambda c: False,
        rotary: Callable = lambda c, d: 0,
        rotates: Callable = lambda c, layer: True,
        interleaved: bool = False,
        key_norm: Callable = lambda c: False,
        kv_heads: Callable | None = None,
        norm_weights: tuple[str, ...] = (),
        refuses: tuple[Refusal, ...] = (),
        stored: Callable[[dict], dict] | None = None,
        arguments: Callable[[dict], dict] | None = None,
        tuples: bool = False,
        models: str = "",
        positions: str = "RoPE",
        norms: str = "none",
    ):
        self.model_type, self.prefix, self.layer_path = model_type, prefix, layers
        self.attention, self.output, self.projections, self.layout, self.query = (
            attention,
            output,
            projections,
            layout,
            query,
        )
        self.key_projection = projections[min(1, len(projections) - 1)]
        self.transposed, self.biased, self.rotary, self.interleaved, self.key_norm = (
            transposed,
            biased,
            rotary,
            interleaved,
            key_norm,
        )
        self.kv_heads, self.norm_weights = kv_heads, norm_weights
        self.refuses, self.tuples = refuses, tuples
        self.models, self.positions, self.norms = models, positions, norms
        self.rotates = rotates
        own: Any = self  # functions in the place of two methods
        own.stored = stored or super().stored
        own.layer_arguments = arguments or super().layer_arguments

    def layers(self, config) -> int:
        return config.num_hidden_layers

    def geometry(self, config, layer: int = 0) -> Geometry:
        heads = config.num_attention_heads
        H = (
            self.kv_heads(config)
            if self.kv_heads
            else getattr(config, "num_key_value_heads", None) or heads
        )
        d = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Geometry(
            config.hidden_size,
            H,
            heads // H,
            d,
            self.rotary(config, d) if self.rotates(config, layer) else 0,
            self.key_norm(config),
        )

    def refuse(self, config) -> None:
        for refusal in self.refuses:
            if refusal.when(config):
                raise LrkvError(
                    f"{self.model_type} with {refusal.what} is not supported", refusal.hint
                )

    def rows(self, config) -> Rows:
        """Output channels per head, of queries and keys in half-split order."""
        g = self.geometry(config)
        q, k, v = self.layout(g)
        if self.interleaved:
            order = half_split(g.head_dim, g.rotary_dim)
            q, k = q[..., order], k[..., order]
        return q, k, v

    def keys(self, projected: Tensor, config) -> Tensor:
        return projected[:, self.rows(config)[1].to(projected.device)]

    def split(self, read, layer: int, config) -> AttentionWeights:
        at, weight, bias, biased = self.module(layer), [], [], self.biased(config)
        biased = biased if isinstance(biased, str) else "qkv" * bool(biased)
        every, fused = self.rows(config), len(self.projections) == 1
        for kind, rows in zip("qkv", every):
            name = at + self.projections["qkv".index(kind) if len(self.projections) == 3 else 0]
            W = read(f"{name}.weight")
            W, needed = (
                W if self.transposed else W.T,
                (sum(r.numel() for r in every) if fused else rows.numel()),
            )
            if W.shape[1] != needed:
                raise LrkvError(
                    f"{name} has {W.shape[1]} outputs, of which the config makes {needed} into"
                    " heads",
                    "is config.json that of these weights?",
                )
            # (D, H G d) or (D, H d)
            W = W[:, rows.flatten()]
            # (H, G, D, d) or (H, D, d)
            weight.append(W.reshape(len(W), *rows.shape).movedim(0, -2))
            bias.append(read(f"{name}.bias")[rows] if kind in biased else None)
        g, W_O = self.geometry(config), read(f"{at}{self.output}.weight")
        W_Q, W_K, W_V = weight
        return AttentionWeights(
            W_Q,
            W_K,
            W_V,
            (W_O if self.transposed else W_O.T).reshape(g.kv_heads, g.groups, g.head_dim, -1),
            *bias,
        )

    def join(self, weights: AttentionWeights) -> dict[str, Tensor]:
        # (H G d, D) each
        W_Q, W_O = weights.W_Q.permute(0, 1, 3, 2).flatten(0, 2), weights.W_O.flatten(0, 2)
        tensors = {
            f"{self.query}.weight": W_Q.T if self.transposed else W_Q,
            f"{self.output}.weight": W_O if self.transposed else W_O.T,
        }
        if weights.b_Q is not None:
            tensors[f"{self.query}.bias"] = weights.b_Q.flatten()
        return tensors

    def queries(self, tensors: dict[str, Tensor], geometry: Geometry) -> Tensor:
        W = tensors[f"{self.query}.weight"]
        W = W if self.transposed else W.T
        return W.reshape(len(W), geometry.kv_heads, geometry.groups, geometry.head_dim).movedim(
            0, -2
        )

    def rest(self, checkpoint, layer: int) -> dict[str, Tensor]:
        at, g = self.module(layer), self.geometry(checkpoint.config)
        names = [name.removeprefix(at) for name in checkpoint.tensors if name.startswith(at)]
        kept = [
            name
            for name in names
            if name.split(".")[0] not in (*self.projections, *MASKS)
            and name != f"{self.output}.weight"
        ]
        found = {name: checkpoint.tensor(at + name) for name in kept}
        order = half_split(g.head_dim, g.rotary_dim if self.interleaved else 0)
        return {
            name: tensor[..., order] if name.split(".")[0] in self.norm_weights else tensor
            for name, tensor in found.items()
        }
