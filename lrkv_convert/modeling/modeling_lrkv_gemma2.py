"""Gemma 2 with LRKV attention. Differs from transformers' Gemma 2 only in keys, values and their
cache.
"""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvGemma2Config(Gemma2Config):
    """Gemma2Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gemma2"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGemma2Attention(LrkvRotaryAttention, Gemma2Attention):
    kernel = ()  # scores have a soft cap

    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


class LrkvGemma2Model(LrkvRotaryModel, Gemma2Model):
    config_class = LrkvGemma2Config
    attention_class = LrkvGemma2Attention
    _supports_sdpa = False  # it knows no soft cap


class LrkvGemma2ForCausalLM(LrkvCausal, Gemma2ForCausalLM):
    config_class = LrkvGemma2Config
    base_class = LrkvGemma2Model
    _supports_sdpa = False
