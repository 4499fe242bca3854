"""GPT-NeoX with LRKV attention. Differs from transformers' GPT-NeoX only in keys, values and their
cache.
"""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvGPTNeoXConfig(GPTNeoXConfig):
    """GPTNeoXConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gpt_neox"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGPTNeoXAttention(LrkvRotaryAttention, GPTNeoXAttention):
    projections = ("query_key_value",)
    output = "dense"


class LrkvGPTNeoXModel(LrkvRotaryModel, GPTNeoXModel):
    config_class = LrkvGPTNeoXConfig
    attention_class = LrkvGPTNeoXAttention
    attention_name = "attention"


class LrkvGPTNeoXForCausalLM(LrkvCausal, GPTNeoXForCausalLM):
    config_class = LrkvGPTNeoXConfig
    base_class = LrkvGPTNeoXModel
