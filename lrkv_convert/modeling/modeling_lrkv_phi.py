"""Phi with LRKV attention. Differs from transformers' Phi only in keys, values and their cache."""

from transformers import PhiConfig, PhiForCausalLM, PhiModel
from transformers.models.phi.modeling_phi import PhiAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvPhiConfig(PhiConfig):
    """PhiConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_phi"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvPhiAttention(LrkvRotaryAttention, PhiAttention):
    output = "dense"


class LrkvPhiModel(LrkvRotaryModel, PhiModel):
    config_class = LrkvPhiConfig
    attention_class = LrkvPhiAttention


class LrkvPhiForCausalLM(LrkvCausal, PhiForCausalLM):
    config_class = LrkvPhiConfig
    base_class = LrkvPhiModel
