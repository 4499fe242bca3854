"""Mixtral with LRKV attention. Differs from transformers' Mixtral only in keys, values and their
cache.
"""

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvMixtralConfig(MixtralConfig):
    """MixtralConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_mixtral"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvMixtralAttention(LrkvRotaryAttention, MixtralAttention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class LrkvMixtralModel(LrkvRotaryModel, MixtralModel):
    config_class = LrkvMixtralConfig
    attention_class = LrkvMixtralAttention


class LrkvMixtralForCausalLM(LrkvCausal, MixtralForCausalLM):
    config_class = LrkvMixtralConfig
    base_class = LrkvMixtralModel
