"""BART with LRKV attention in its decoder. Differs from transformers' BART only in keys, values and
their cache.
"""

from transformers import BartConfig, BartForConditionalGeneration, BartModel
from transformers.models.bart.modeling_bart import BartAttention, BartDecoder

from .encoder_decoder_lrkv import LrkvBartAttention, LrkvDecoder
from .models_lrkv import LrkvCausal, LrkvPreTrained


class LrkvBartConfig(BartConfig):
    """BartConfig with `lrkv` and `lrkv_cross`: base widths and ranks of decoder self- and
    cross-attention, and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_bart"
    lrkv: dict | None = None
    lrkv_cross: dict | None = None
    lrkv_path: str = "auto"


class LrkvBartDecoderAttention(LrkvBartAttention, BartAttention):
    """Bart's decoder attention, of either kind."""


class LrkvBartDecoder(LrkvDecoder, BartDecoder):
    config_class = LrkvBartConfig
    attention_class = LrkvBartDecoderAttention


class LrkvBartModel(LrkvPreTrained, BartModel):
    config_class = LrkvBartConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvBartDecoder(config)
        self.post_init()


class LrkvBartForConditionalGeneration(LrkvCausal, BartForConditionalGeneration):
    config_class = LrkvBartConfig
    base_class = LrkvBartModel
