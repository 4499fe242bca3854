"""OPT with LRKV attention. Differs from transformers' OPT only in keys, values and their cache."""

from transformers import OPTConfig, OPTForCausalLM, OPTModel
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoder

from .attention_lrkv import LrkvAttention
from .contract_lrkv import take_cache
from .models_lrkv import LrkvCausal, LrkvModel, LrkvPreTrained


class LrkvOPTConfig(OPTConfig):
    """OPTConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_opt"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvOPTAttention(LrkvAttention, OPTAttention):
    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.take_over(config, layer_idx, "k_proj", "v_proj")

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        cache = take_cache(kwargs)
        output, weights = self.factored_attention(
            self.heads_of(self.q_proj(hidden_states)),
            hidden_states,
            attention_mask,
            cache,
            dropout=self.dropout,
            **kwargs,
        )
        return self.out_proj(output), weights


class LrkvOPTDecoder(LrkvModel, OPTDecoder):
    config_class = LrkvOPTConfig
    attention_class = LrkvOPTAttention


class LrkvOPTModel(LrkvPreTrained, OPTModel):
    config_class = LrkvOPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvOPTDecoder(config)
        self.post_init()


class LrkvOPTForCausalLM(LrkvCausal, OPTForCausalLM):
    config_class = LrkvOPTConfig
    base_class = LrkvOPTModel
