"""BLOOM with LRKV attention. Differs from transformers' BLOOM only in keys, values and their
cache.
"""

from transformers import BloomConfig, BloomForCausalLM, BloomModel
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add

from .attention_lrkv import LrkvAttention
from .contract_lrkv import take_cache
from .models_lrkv import LrkvCausal, LrkvModel


class LrkvBloomConfig(BloomConfig):
    """BloomConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_bloom"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvBloomAttention(LrkvAttention, BloomAttention):
    """ALiBi is added to the scores with the mask."""

    kernel, attends_itself = (), True  # the mask has ALiBi in it, head by head

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.scaling = config, self.inv_norm_factor
        self.take_over(config, layer_idx, "query_key_value")

    def forward(self, hidden_states, residual=None, alibi=None, attention_mask=None, **kwargs):
        alibi = alibi.view(-1, self.num_heads, 1, alibi.shape[-1])  # (N, H, 1, S)
        mask = alibi if attention_mask is None else alibi + attention_mask
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            mask,
            take_cache(kwargs),
            dropout=self.attention_dropout.p,
        )
        output = self.dense(output)
        return (
            output
            if residual is None
            else dropout_add(output, residual, self.hidden_dropout, self.training)
        ), weights


class LrkvBloomModel(LrkvModel, BloomModel):
    config_class = LrkvBloomConfig
    attention_class = LrkvBloomAttention
    attention_name = "self_attention"

    def decoder_layers(self):
        return self.h


class LrkvBloomForCausalLM(LrkvCausal, BloomForCausalLM):
    config_class = LrkvBloomConfig
    base_class = LrkvBloomModel
