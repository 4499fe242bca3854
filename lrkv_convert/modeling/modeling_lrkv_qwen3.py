"""Qwen3 with LRKV attention. Differs from transformers' Qwen3 only in keys, values and their
cache.
"""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvQwen3Config(Qwen3Config):
    """Qwen3Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_qwen3"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvQwen3Attention(LrkvRotaryAttention, Qwen3Attention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}

    def kernel_norm(self):
        return self.k_norm


class LrkvQwen3Model(LrkvRotaryModel, Qwen3Model):
    config_class = LrkvQwen3Config
    attention_class = LrkvQwen3Attention


class LrkvQwen3ForCausalLM(LrkvCausal, Qwen3ForCausalLM):
    config_class = LrkvQwen3Config
    base_class = LrkvQwen3Model
