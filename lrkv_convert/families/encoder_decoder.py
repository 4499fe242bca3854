"""Encoder-decoders: where the two kinds of decoder attention lie, self-attention and
cross-attention, each an Adapter of its own. True multi-head attention without rotation; the
encoder's attention is no concern of ours: nothing of it is cached.
"""

from dataclasses import dataclass

from ..errors import LrkvError
from .base import Adapter, Geometry
from .decoder import DecoderAdapter

KINDS = ("self", "cross")  # of decoder attention


class DecoderAttention(DecoderAdapter):
    """One kind of attention in the decoder's layers.

    fields: of the config that give layers, width, heads and, where it is not width / heads, the
    head width; biases: which of "qkv" have one.
    """

    def __init__(self, model_type: str, fields: tuple[str, ...], biases: str, **more):
        super().__init__(
            model_type, query=more["projections"][0], biased=lambda config: biases, **more
        )
        self.fields = fields

    def geometry(self, config) -> Geometry:
        layers, width, H, *head_dim = (getattr(config, name) for name in self.fields)
        return Geometry(layers, width, H, 1, head_dim[0] if head_dim else width // H)


@dataclass(frozen=True)
class EncoderDecoder:
    """A family: the attention adapters of its decoder by kind, and where its two stacks lie.

    encoder, decoder: paths of the stacks in the model; layers: name of the layers in either;
    speech: whether the encoder reads sound; relative: whether the first layer's attention makes a
    position bias that the others are handed (and layers give tuples); mask: what attention calls
    what it is to add to its scores.
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
            raise LrkvError(
                f"this {config.model_type} is a decoder on its own",
                "whole encoder-decoders are supported",
            )
        if self.any.geometry(config).kv_heads == 1:
            raise LrkvError(
                "this model has one attention head",
                "there is nothing to share; LRKV needs at least two",
            )


def _bart(model_type: str, models: str, biases: str, positions: str, **more) -> EncoderDecoder:
    fields, where = (
        ("decoder_layers", "d_model", "decoder_attention_heads"),
        dict(
            prefix="model.",
            layers="model.decoder.layers",
            output="out_proj",
            models=models,
            positions=positions,
        ),
    )
    kind = lambda attention: DecoderAttention(
        model_type,
        fields,
        biases,
        projections=("q_proj", "k_proj", "v_proj"),
        attention=attention,
        **where,
    )
    return EncoderDecoder(
        {"self": kind("self_attn"), "cross": kind("encoder_attn")},
        "model.encoder",
        "model.decoder",
        "layers",
        **more,
    )


def _t5() -> EncoderDecoder:
    fields, where = (
        ("num_decoder_layers", "d_model", "num_heads", "d_kv"),
        dict(
            prefix="",
            layers="decoder.block",
            output="o",
            models="T5, FLAN-T5",
            positions="relative, added to the scores",
        ),
    )
    kind = lambda attention, kernel: DecoderAttention(
        "t5", fields, "", projections=("q", "k", "v"), attention=attention, kernel=kernel, **where
    )
    return EncoderDecoder(
        {
            "self": kind("layer.0.SelfAttention", False),
            "cross": kind("layer.1.EncDecAttention", True),
        },
        "encoder",
        "decoder",
        "block",
        relative=True,
        mask="mask",
    )


ENCODER_DECODERS: dict[str, EncoderDecoder] = {
    family.any.model_type: family
    for family in (
        _bart("bart", "BART", "qkv", "learned"),
        _bart("marian", "Marian, OPUS-MT", "qkv", "sinusoidal"),
        _bart("pegasus", "Pegasus", "qkv", "sinusoidal"),
        _t5(),
        _bart("whisper", "Whisper", "qv", "learned", speech=True),
    )
}
