"""Phi-3 with LRKV attention. Differs from transformers' Phi-3 only in keys, values and their
cache.
"""

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvPhi3Config(Phi3Config):
    """Phi3Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_phi3"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvPhi3Attention(LrkvRotaryAttention, Phi3Attention):
    projections = ("qkv_proj",)

    def extra_arguments(self) -> dict:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class LrkvPhi3Model(LrkvRotaryModel, Phi3Model):
    config_class = LrkvPhi3Config
    attention_class = LrkvPhi3Attention


class LrkvPhi3ForCausalLM(LrkvCausal, Phi3ForCausalLM):
    config_class = LrkvPhi3Config
    base_class = LrkvPhi3Model
