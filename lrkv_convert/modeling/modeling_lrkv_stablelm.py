"""StableLM with LRKV attention. Differs from transformers' StableLM only in keys, values and their
cache.
"""

from transformers import StableLmConfig, StableLmForCausalLM, StableLmModel
from transformers.models.stablelm.modeling_stablelm import StableLmAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvStableLmConfig(StableLmConfig):
    """StableLmConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_stablelm"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvStableLmAttention(LrkvRotaryAttention, StableLmAttention):
    pass


class LrkvStableLmModel(LrkvRotaryModel, StableLmModel):
    config_class = LrkvStableLmConfig
    attention_class = LrkvStableLmAttention
    hands_on = False


class LrkvStableLmForCausalLM(LrkvCausal, StableLmForCausalLM):
    config_class = LrkvStableLmConfig
    base_class = LrkvStableLmModel
