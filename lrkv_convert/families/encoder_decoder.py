"""Encoder-decoders: where the two kinds of decoder attention lie, self-attention and
cross-attention, each an Adapter of its own. True multi-head attention without rotation; the
encoder's attention is no concern of ours: nothing of it is cached.
"""

from .base import Encoder, Family, Geometry
from .decoder import DecoderAdapter


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

    def layers(self, config) -> int:
        return getattr(config, self.fields[0])

    def geometry(self, config, layer: int = 0) -> Geometry:
        width, H, *head_dim = (getattr(config, name) for name in self.fields[1:])
        return Geometry(width, H, 1, head_dim[0] if head_dim else width // H)


def _bart(model_type: str, models: str, biases: str, positions: str, **more) -> Family:
    """A family with attention as BART has it. more: what is particular of its `Encoder`."""
    fields = ("decoder_layers", "d_model", "decoder_attention_heads")
    kind = lambda attention: DecoderAttention(
        model_type,
        fields,
        biases,
        projections=("q_proj", "k_proj", "v_proj"),
        attention=attention,
        prefix="model.",
        layers="model.decoder.layers",
        output="out_proj",
        models=models,
        positions=positions,
    )
    return Family(
        {"self": kind("self_attn"), "cross": kind("encoder_attn")},
        Encoder("model.encoder", "model.decoder", "layers", **more),
    )


def _t5() -> Family:
    fields = ("num_decoder_layers", "d_model", "num_heads", "d_kv")
    kind = lambda attention: DecoderAttention(
        "t5",
        fields,
        "",
        projections=("q", "k", "v"),
        attention=attention,
        prefix="",
        layers="decoder.block",
        output="o",
        models="T5, FLAN-T5",
        positions="relative, added to the scores",
    )
    return Family(
        {
            "self": kind("layer.0.SelfAttention"),
            "cross": kind("layer.1.EncDecAttention"),
        },
        Encoder("encoder", "decoder", "block", relative=True, mask="mask"),
    )


ENCODER_DECODERS = (
    _bart("bart", "BART", "qkv", "learned"),
    _bart("marian", "Marian, OPUS-MT", "qkv", "sinusoidal"),
    _bart("pegasus", "Pegasus", "qkv", "sinusoidal"),
    _t5(),
    _bart("whisper", "Whisper", "qv", "learned", speech=True),
)
