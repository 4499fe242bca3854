"""MPT with LRKV attention. Differs from transformers' MPT only in keys, values and their cache."""

import torch
from transformers import MptConfig, MptForCausalLM, MptModel
from transformers.models.mpt.modeling_mpt import MptAttention

from .attention_lrkv import LrkvAttention
from .contract_lrkv import take_cache
from .models_lrkv import LrkvCausal, LrkvModel


class LrkvMptConfig(MptConfig):
    """MptConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_mpt"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvMptAttention(LrkvAttention, MptAttention):
    """ALiBi is added to the scores with the mask."""

    kernel, attends_itself = (), True  # the mask has ALiBi in it, head by head

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.scaling = config, self.softmax_scale
        self.take_over(config, layer_idx, "Wqkv")

    def forward(self, hidden_states, position_bias=None, attention_mask=None, **kwargs):
        mask = self.biased_mask(position_bias, attention_mask)
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            mask,
            take_cache(kwargs),
            dropout=self.attn_dropout_p,
        )
        return self.out_proj(output), weights

    def biased_mask(self, alibi: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """alibi (H, 1, longest), masked (N, 1, T, S) bool -> what to add to scores, (N, H, T, S).
        Counted from the last key, which the softmax ignores.
        """
        return alibi[:, :, -masked.shape[-1] :].masked_fill(masked, torch.finfo(alibi.dtype).min)


class LrkvMptModel(LrkvModel, MptModel):
    config_class = LrkvMptConfig
    attention_class = LrkvMptAttention
    attention_name = "attn"

    def decoder_layers(self):
        return self.blocks


class LrkvMptForCausalLM(LrkvCausal, MptForCausalLM):
    config_class = LrkvMptConfig
    base_class = LrkvMptModel
