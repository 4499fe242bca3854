"""Qwen2 with LRKV attention. Differs from transformers' Qwen2 only in keys, values and their
cache.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvQwen2Config(Qwen2Config):
    """Qwen2Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_qwen2"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvQwen2Attention(LrkvRotaryAttention, Qwen2Attention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class LrkvQwen2Model(LrkvRotaryModel, Qwen2Model):
    config_class = LrkvQwen2Config
    attention_class = LrkvQwen2Attention


class LrkvQwen2ForCausalLM(LrkvCausal, Qwen2ForCausalLM):
    config_class = LrkvQwen2Config
    base_class = LrkvQwen2Model
