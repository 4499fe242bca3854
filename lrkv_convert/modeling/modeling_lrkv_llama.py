"""Llama with LRKV attention. Differs from transformers' Llama only in keys, values and their cache."""
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from .attention_lrkv import LrkvPreTrained, LrkvRotaryAttention, LrkvRotaryModel


class LrkvLlamaConfig(LlamaConfig):
    """LlamaConfig with `lrkv`: base widths and ranks of keys and values, per layer (see `low_rank_heads`), and `lrkv_path` (see `choose_path`)."""

    model_type = "lrkv_llama"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvLlamaAttention(LrkvRotaryAttention, LlamaAttention):
    eager_attention = staticmethod(eager_attention_forward)


class LrkvLlamaModel(LrkvRotaryModel, LlamaModel):
    config_class = LrkvLlamaConfig
    attention_class = LrkvLlamaAttention


class LrkvLlamaForCausalLM(LrkvPreTrained, LlamaForCausalLM):
    config_class = LrkvLlamaConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LrkvLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
