"""Qwen2 with LRKV attention. Differs from transformers' Qwen2 only in keys, values and their cache."""
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

from .attention_lrkv import LrkvPreTrained, LrkvRotaryAttention, LrkvRotaryModel


class LrkvQwen2Config(Qwen2Config):
    """Qwen2Config with `lrkv`: base widths and ranks of keys and values, per layer (see `low_rank_heads`), and `lrkv_path` (see `choose_path`)."""

    model_type = "lrkv_qwen2"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvQwen2Attention(LrkvRotaryAttention, Qwen2Attention):
    eager_attention = staticmethod(eager_attention_forward)

    def window(self) -> dict:
        return {"sliding_window": self.sliding_window}


class LrkvQwen2Model(LrkvRotaryModel, Qwen2Model):
    config_class = LrkvQwen2Config
    attention_class = LrkvQwen2Attention


class LrkvQwen2ForCausalLM(LrkvPreTrained, Qwen2ForCausalLM):
    config_class = LrkvQwen2Config

    def __init__(self, config):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = LrkvQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
