"""GPT-Neo with LRKV attention. Differs from transformers' GPT-Neo only in keys, values and their
cache.
"""

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from .attention_lrkv import LrkvAttention
from .contract_lrkv import take_cache
from .models_lrkv import LrkvCausal, LrkvModel


class LrkvGPTNeoConfig(GPTNeoConfig):
    """GPTNeoConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gpt_neo"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGPTNeoAttention(LrkvAttention, GPTNeoSelfAttention):
    """Scores are not scaled; in "local" layers a query sees the last `window_size` tokens only."""

    float32_scores, kernel, attends_itself, scaling = True, (), True, 1.0

    def __init__(self, config, layer_idx: int):
        super().__init__(config, config.attention_layers[layer_idx], layer_idx)
        self.layer_idx = layer_idx
        self.take_over(config, layer_idx, "k_proj", "v_proj")

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        cache = take_cache(kwargs)
        if self.attention_type == "local":
            attention_mask = self.local(attention_mask, hidden_states.shape[1], cache)
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            dropout=self.attn_dropout.p,
        )
        return self.resid_dropout(self.out_proj(output)), weights

    def local(self, mask: torch.Tensor, tokens: int, cache) -> torch.Tensor:
        """The additive mask (N, 1, T, S) without what lies outside the window."""
        held = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        query, key = (
            torch.arange(tokens, device=mask.device) + held,
            torch.arange(mask.shape[-1], device=mask.device),
        )
        return mask.masked_fill(
            query[:, None] - key >= self.config.window_size, torch.finfo(mask.dtype).min
        )


class LrkvGPTNeoModel(LrkvModel, GPTNeoModel):
    config_class = LrkvGPTNeoConfig
    attention_class = LrkvGPTNeoAttention
    attention_name = "attn.attention"
    _supports_flash_attn = False  # it would be told of no window

    def decoder_layers(self):
        return self.h


class LrkvGPTNeoForCausalLM(LrkvCausal, GPTNeoForCausalLM):
    config_class = LrkvGPTNeoConfig
    base_class = LrkvGPTNeoModel
    _supports_flash_attn = False
