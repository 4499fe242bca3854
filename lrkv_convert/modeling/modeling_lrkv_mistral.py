"""Mistral with LRKV attention. Differs from transformers' Mistral only in keys, values and their cache."""
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MistralModel, MistralPreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

from .attention_lrkv import LrkvPreTrained, LrkvRotaryAttention, LrkvRotaryModel


class LrkvMistralConfig(MistralConfig):
    """MistralConfig with `lrkv`: base widths and ranks of keys and values, per layer (see `low_rank_heads`), and `lrkv_path` (see `choose_path`)."""

    model_type = "lrkv_mistral"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvMistralAttention(LrkvRotaryAttention, MistralAttention):
    eager_attention = staticmethod(eager_attention_forward)

    def window(self) -> dict:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class LrkvMistralModel(LrkvRotaryModel, MistralModel):
    config_class = LrkvMistralConfig
    attention_class = LrkvMistralAttention


class LrkvMistralForCausalLM(LrkvPreTrained, MistralForCausalLM):
    config_class = LrkvMistralConfig

    def __init__(self, config):
        MistralPreTrainedModel.__init__(self, config)
        self.model = LrkvMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
