"""OLMo with LRKV attention. Differs from transformers' OLMo only in keys, values and their
cache.
"""

from transformers import OlmoConfig, OlmoForCausalLM, OlmoModel
from transformers.models.olmo.modeling_olmo import OlmoAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvOlmoConfig(OlmoConfig):
    """OlmoConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_olmo"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvOlmoAttention(LrkvRotaryAttention, OlmoAttention):
    pass


class LrkvOlmoModel(LrkvRotaryModel, OlmoModel):
    config_class = LrkvOlmoConfig
    attention_class = LrkvOlmoAttention


class LrkvOlmoForCausalLM(LrkvCausal, OlmoForCausalLM):
    config_class = LrkvOlmoConfig
    base_class = LrkvOlmoModel
