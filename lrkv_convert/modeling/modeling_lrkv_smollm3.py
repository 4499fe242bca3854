"""SmolLM3 with LRKV attention. Differs from transformers' SmolLM3 only in keys, values and their
cache.
"""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvSmolLM3Config(SmolLM3Config):
    """SmolLM3Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_smollm3"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvSmolLM3Attention(LrkvRotaryAttention, SmolLM3Attention):
    """In some layers nothing is rotated: their keys are read in place, as in GPT-2."""

    @property
    def rotates(self) -> bool:
        return bool(self.use_rope)

    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}


class LrkvSmolLM3Model(LrkvRotaryModel, SmolLM3Model):
    config_class = LrkvSmolLM3Config
    attention_class = LrkvSmolLM3Attention


class LrkvSmolLM3ForCausalLM(LrkvCausal, SmolLM3ForCausalLM):
    config_class = LrkvSmolLM3Config
    base_class = LrkvSmolLM3Model
