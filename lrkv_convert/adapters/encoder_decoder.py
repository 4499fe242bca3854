"""Encoder-decoders: where the two kinds of decoder attention lie, self-attention and cross-attention, each an Adapter of its own. True multi-head attention
without rotation; the encoder's attention is no concern of ours: nothing of it is cached."""
from dataclasses import dataclass

from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry, heads

KINDS = ("self", "cross")       # of decoder attention


class DecoderAttention(Adapter):
    """One kind of attention in the decoder's layers: q, k, v and output as Linear (weights (out, in)).

    names: of the four projections in the module; fields: of the config that give layers, width, heads and, where it is not width / heads, the head width;
    biased: which of "qkvo" have biases.
    """

    def __init__(self, model_type: str, prefix: str, layer_path: str, attention: str, names: tuple[str, str, str, str], fields: tuple[str, ...], biased: str):
        self.model_type, self.modeling, self.prefix, self.layer_path, self.attention = model_type, f"modeling_lrkv_{model_type}", prefix, layer_path, attention
        self.query, self.key_projection, self.value, self.output = names
        self.fields, self.biased = fields, biased

    def geometry(self, config) -> Geometry:
        layers, width, H, *head_dim = (getattr(config, name) for name in self.fields)
        return Geometry(layers, width, H, 1, head_dim[0] if head_dim else width // H, rotary=False)

    def split(self, read, layer: int, config) -> AttentionWeights:
        g, at = self.geometry(config), self.module(layer)
        weight = lambda name: read(f"{at}{name}.weight").T                                  # (in, out)
        bias = lambda p, name, *shape: read(f"{at}{name}.bias").view(*shape, g.head_dim) if p in self.biased else None
        return AttentionWeights(
            W_Q=heads(weight(self.query), g.kv_heads, 1), W_K=heads(weight(self.key_projection), g.kv_heads), W_V=heads(weight(self.value), g.kv_heads),
            W_O=weight(self.output).reshape(g.kv_heads, 1, g.head_dim, -1),
            b_Q=bias("q", self.query, g.kv_heads, 1), b_K=bias("k", self.key_projection, g.kv_heads), b_V=bias("v", self.value, g.kv_heads))

    def join(self, weights: AttentionWeights) -> dict:
        D = weights.W_Q.shape[2]
        tensors = {f"{self.query}.weight": weights.W_Q.permute(0, 1, 3, 2).reshape(-1, D), f"{self.output}.weight": weights.W_O.reshape(-1, weights.W_O.shape[-1]).T}
        return tensors if weights.b_Q is None else tensors | {f"{self.query}.bias": weights.b_Q.reshape(-1)}

    def queries(self, tensors: dict, geometry: Geometry):
        return heads(tensors[f"{self.query}.weight"].T, geometry.kv_heads, 1)


@dataclass(frozen=True)
class EncoderDecoder:
    """A family: the attention adapters of its decoder by kind, and where its two stacks lie.

    encoder, decoder: paths of the stacks in the model; layers: name of the layers in either; speech: whether the encoder reads sound; relative: whether the
    first layer's attention makes a position bias that the others are handed (and layers give tuples); mask: what attention calls what it is to add to its scores.
    """

    kinds: dict[str, Adapter]
    encoder: str
    decoder: str
    layers: str
    speech: bool = False
    relative: bool = False
    mask: str = "attention_mask"

    @property
    def any(self) -> Adapter:
        """One of the kinds, for what both have."""
        return self.kinds["self"]

    def refuse(self, config) -> None:
        """Raise LrkvError for variants that cannot be converted."""
        if not config.is_encoder_decoder:
            raise LrkvError(f"this {config.model_type} is a decoder on its own", "whole encoder-decoders are supported")
        if self.any.geometry(config).kv_heads == 1:
            raise LrkvError("this model has one attention head", "there is nothing to share; LRKV needs at least two")


def _bart(model_type: str, biased: str, **more) -> EncoderDecoder:
    names, fields = ("q_proj", "k_proj", "v_proj", "out_proj"), ("decoder_layers", "d_model", "decoder_attention_heads")
    kind = lambda attention: DecoderAttention(model_type, "model.", "model.decoder.layers", attention, names, fields, biased)
    return EncoderDecoder({"self": kind("self_attn"), "cross": kind("encoder_attn")}, "model.encoder", "model.decoder", "layers", **more)


def _t5() -> EncoderDecoder:
    fields = ("num_decoder_layers", "d_model", "num_heads", "d_kv")
    kind = lambda attention: DecoderAttention("t5", "", "decoder.block", attention, ("q", "k", "v", "o"), fields, "")
    return EncoderDecoder({"self": kind("layer.0.SelfAttention"), "cross": kind("layer.1.EncDecAttention")}, "encoder", "decoder", "block", relative=True, mask="mask")


ENCODER_DECODERS: dict[str, EncoderDecoder] = {family.any.model_type: family for family in (
    _bart("bart", "qkvo"), _bart("marian", "qkvo"), _t5(), _bart("whisper", "qvo", speech=True))}
