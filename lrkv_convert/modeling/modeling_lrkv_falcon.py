"""Falcon with LRKV attention. Differs from transformers' Falcon only in keys, values and their
cache.
"""

from transformers import FalconConfig, FalconForCausalLM, FalconModel
from transformers.models.falcon.modeling_falcon import FalconAttention

from .attention_lrkv import LrkvAttention, rotations_in
from .contract_lrkv import take_cache
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvFalconConfig(FalconConfig):
    """FalconConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_falcon"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvFalconAttention(LrkvAttention, FalconAttention):
    """With ALiBi, what transformers hands on as mask has it in it."""

    tables_interleaved, attends_itself = False, True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling, self.num_key_value_groups = (
            self.inv_norm_factor,
            self.num_heads // self.num_kv_heads,
        )
        self.take_over(config, layer_idx, "query_key_value", heads=self.num_kv_heads)

    def forward(
        self,
        hidden_states,
        alibi=None,
        attention_mask=None,
        position_ids=None,
        position_embeddings=None,
        **kwargs,
    ):
        cache, rotations = take_cache(kwargs), None
        if not self.config.alibi:
            rotations = rotations_in(cache, "full_attention", hidden_states.device)
            if rotations is None:
                rotations = (self.looked_at(position_embeddings, hidden_states.shape[1]),) * 2
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            rotations,
            self.attention_dropout.p if self.config.alibi else 0.0,
        )
        return self.dense(output), weights


class LrkvFalconModel(LrkvRotaryModel, FalconModel):
    config_class = LrkvFalconConfig
    attention_class = LrkvFalconAttention
    attention_name = "self_attention"
    hands_on = False

    def cache_arguments(self, *args):
        return {} if self.config.alibi else super().cache_arguments(*args)

    def decoder_layers(self):
        return self.h


class LrkvFalconForCausalLM(LrkvCausal, FalconForCausalLM):
    config_class = LrkvFalconConfig
    base_class = LrkvFalconModel
