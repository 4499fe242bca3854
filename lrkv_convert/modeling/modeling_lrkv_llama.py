"""Llama with LRKV attention. Differs from transformers' Llama only in keys, values and their
cache.
"""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvLlamaConfig(LlamaConfig):
    """LlamaConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_llama"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvLlamaAttention(LrkvRotaryAttention, LlamaAttention):
    pass


class LrkvLlamaModel(LrkvRotaryModel, LlamaModel):
    config_class = LrkvLlamaConfig
    attention_class = LrkvLlamaAttention


class LrkvLlamaForCausalLM(LrkvCausal, LlamaForCausalLM):
    config_class = LrkvLlamaConfig
    base_class = LrkvLlamaModel
