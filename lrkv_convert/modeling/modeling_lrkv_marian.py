"""Marian with LRKV attention in its decoder. Differs from transformers' Marian only in keys, values
and their cache.
"""

from transformers import MarianConfig, MarianModel, MarianMTModel
from transformers.models.marian.modeling_marian import MarianAttention, MarianDecoder

from .encoder_decoder_lrkv import LrkvBartAttention, LrkvDecoder
from .models_lrkv import LrkvCausal, LrkvPreTrained


class LrkvMarianConfig(MarianConfig):
    """MarianConfig with `lrkv` and `lrkv_cross`: base widths and ranks of decoder self- and
    cross-attention, and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_marian"
    lrkv: dict | None = None
    lrkv_cross: dict | None = None
    lrkv_path: str = "auto"


class LrkvMarianDecoderAttention(LrkvBartAttention, MarianAttention):
    """Marian's decoder attention, of either kind."""


class LrkvMarianDecoder(LrkvDecoder, MarianDecoder):
    config_class = LrkvMarianConfig
    attention_class = LrkvMarianDecoderAttention


class LrkvMarianModel(LrkvPreTrained, MarianModel):
    config_class = LrkvMarianConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvMarianDecoder(config)
        self.post_init()


class LrkvMarianMTModel(LrkvCausal, MarianMTModel):
    config_class = LrkvMarianConfig
    base_class = LrkvMarianModel
