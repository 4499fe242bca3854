"""GPT-2 with LRKV attention. Differs from transformers' GPT-2 only in keys, values and their
cache.
"""

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from .attention_lrkv import LrkvAttention
from .contract_lrkv import take_cache
from .forms_lrkv import low_rank_heads
from .models_lrkv import LrkvCausal, LrkvModel


class LrkvGPT2Config(GPT2Config):
    """GPT2Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gpt2"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGPT2Attention(LrkvAttention, GPT2Attention):
    """The fused c_attn (q, k, v) becomes q_attn (q alone) and the factored keys and values; there
    is no rotation.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        del self.c_attn
        self.q_attn = Conv1D(self.embed_dim, self.embed_dim)
        self.keys = low_rank_heads(config, layer_idx, "keys", bias=True)
        self.values = low_rank_heads(config, layer_idx, "values", bias=True)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        cache = take_cache(kwargs)
        output, weights = self.factored_attention(
            self.heads_of(self.q_attn(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            dropout=self.attn_dropout.p,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(output)), weights


class LrkvGPT2Model(LrkvModel, GPT2Model):
    config_class = LrkvGPT2Config
    attention_class = LrkvGPT2Attention
    attention_name = "attn"

    def decoder_layers(self):
        return self.h


class LrkvGPT2LMHeadModel(LrkvCausal, GPT2LMHeadModel):
    config_class = LrkvGPT2Config
    base_class = LrkvGPT2Model
