"""Qwen2-MoE with LRKV attention. Differs from transformers' Qwen2-MoE only in keys, values and
their cache.
"""

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvQwen2MoeConfig(Qwen2MoeConfig):
    """Qwen2MoeConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_qwen2_moe"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvQwen2MoeAttention(LrkvRotaryAttention, Qwen2MoeAttention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": getattr(self, "sliding_window", None)}


class LrkvQwen2MoeModel(LrkvRotaryModel, Qwen2MoeModel):
    config_class = LrkvQwen2MoeConfig
    attention_class = LrkvQwen2MoeAttention


class LrkvQwen2MoeForCausalLM(LrkvCausal, Qwen2MoeForCausalLM):
    config_class = LrkvQwen2MoeConfig
    base_class = LrkvQwen2MoeModel
