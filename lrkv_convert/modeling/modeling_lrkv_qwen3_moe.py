"""Qwen3-MoE with LRKV attention. Differs from transformers' Qwen3-MoE only in keys, values and
their cache.
"""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3MoeConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_qwen3_moe"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvQwen3MoeAttention(LrkvRotaryAttention, Qwen3MoeAttention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}

    def kernel_norm(self):
        return self.k_norm


class LrkvQwen3MoeModel(LrkvRotaryModel, Qwen3MoeModel):
    config_class = LrkvQwen3MoeConfig
    attention_class = LrkvQwen3MoeAttention


class LrkvQwen3MoeForCausalLM(LrkvCausal, Qwen3MoeForCausalLM):
    config_class = LrkvQwen3MoeConfig
    base_class = LrkvQwen3MoeModel
