"""Pegasus with LRKV attention in its decoder. Differs from transformers' Pegasus only in keys,
values and their cache.
"""

from transformers import PegasusConfig, PegasusForConditionalGeneration, PegasusModel
from transformers.models.pegasus.modeling_pegasus import PegasusAttention, PegasusDecoder

from .encoder_decoder_lrkv import LrkvBartAttention, LrkvDecoder
from .models_lrkv import LrkvCausal, LrkvPreTrained


class LrkvPegasusConfig(PegasusConfig):
    """PegasusConfig with `lrkv` and `lrkv_cross`: base widths and ranks of decoder self- and
    cross-attention, and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_pegasus"
    lrkv: dict | None = None
    lrkv_cross: dict | None = None
    lrkv_path: str = "auto"


class LrkvPegasusDecoderAttention(LrkvBartAttention, PegasusAttention):
    """Pegasus's decoder attention, of either kind."""


class LrkvPegasusDecoder(LrkvDecoder, PegasusDecoder):
    config_class = LrkvPegasusConfig
    attention_class = LrkvPegasusDecoderAttention


class LrkvPegasusModel(LrkvPreTrained, PegasusModel):
    config_class = LrkvPegasusConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvPegasusDecoder(config)
        self.post_init()


class LrkvPegasusForConditionalGeneration(LrkvCausal, PegasusForConditionalGeneration):
    config_class = LrkvPegasusConfig
    base_class = LrkvPegasusModel
