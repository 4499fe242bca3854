"""Gemma with LRKV attention. Differs from transformers' Gemma only in keys, values and their
cache.
"""

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvGemmaConfig(GemmaConfig):
    """GemmaConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gemma"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGemmaAttention(LrkvRotaryAttention, GemmaAttention):
    pass


class LrkvGemmaModel(LrkvRotaryModel, GemmaModel):
    config_class = LrkvGemmaConfig
    attention_class = LrkvGemmaAttention


class LrkvGemmaForCausalLM(LrkvCausal, GemmaForCausalLM):
    config_class = LrkvGemmaConfig
    base_class = LrkvGemmaModel
