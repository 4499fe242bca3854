"""Mistral with LRKV attention. Differs from transformers' Mistral only in keys, values and their
cache.
"""

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvMistralConfig(MistralConfig):
    """MistralConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_mistral"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvMistralAttention(LrkvRotaryAttention, MistralAttention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class LrkvMistralModel(LrkvRotaryModel, MistralModel):
    config_class = LrkvMistralConfig
    attention_class = LrkvMistralAttention


class LrkvMistralForCausalLM(LrkvCausal, MistralForCausalLM):
    config_class = LrkvMistralConfig
    base_class = LrkvMistralModel
