"""Whisper with LRKV attention in its decoder. Differs from transformers' Whisper only in keys,
values and their cache.
"""

from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoder

from .encoder_decoder_lrkv import LrkvBartAttention, LrkvDecoder
from .models_lrkv import LrkvCausal, LrkvPreTrained


class LrkvWhisperConfig(WhisperConfig):
    """WhisperConfig with `lrkv` and `lrkv_cross`: base widths and ranks of decoder self- and
    cross-attention, and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_whisper"
    lrkv: dict | None = None
    lrkv_cross: dict | None = None
    lrkv_path: str = "auto"


class LrkvWhisperDecoderAttention(LrkvBartAttention, WhisperAttention):
    """Queries are scaled as they are made, as in Whisper, so that no score is scaled again."""

    def __init__(self, config, layer_idx: int, kind: str):
        super().__init__(config, layer_idx, kind)
        self.query_scale, self.scaling = self.scaling, 1.0

    def queries(self, hidden_states):
        return super().queries(hidden_states) * self.query_scale


class LrkvWhisperDecoder(LrkvDecoder, WhisperDecoder):
    config_class = LrkvWhisperConfig
    attention_class = LrkvWhisperDecoderAttention


class LrkvWhisperModel(LrkvPreTrained, WhisperModel):
    config_class = LrkvWhisperConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvWhisperDecoder(config)
        self.post_init()


class LrkvWhisperForConditionalGeneration(LrkvCausal, WhisperForConditionalGeneration):
    config_class = LrkvWhisperConfig
    base_class = LrkvWhisperModel


# where the pipeline of transformers looks for what transcribes
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES["lrkv_whisper"] = "LrkvWhisperForConditionalGeneration"
