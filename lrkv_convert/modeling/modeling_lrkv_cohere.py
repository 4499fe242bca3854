"""Cohere with LRKV attention. Differs from transformers' Cohere only in keys, values and their
cache, and RoPE turns halves of a head, whose channels were reordered accordingly.
"""

from transformers import CohereConfig, CohereForCausalLM, CohereModel
from transformers.models.cohere.modeling_cohere import CohereAttention

from .attention_lrkv import LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvCohereConfig(CohereConfig):
    """CohereConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_cohere"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvCohereAttention(LrkvRotaryAttention, CohereAttention):
    tables_interleaved = True

    # Norms here have a weight per head, and take heads before channels.

    def key_norm(self):
        return (
            (lambda keys: self.k_norm(keys.transpose(1, 2)).transpose(1, 2))
            if self.use_qk_norm
            else None
        )

    def normalised(self, query):
        return self.q_norm(query.transpose(1, 2)).transpose(1, 2) if self.use_qk_norm else query


class LrkvCohereModel(LrkvRotaryModel, CohereModel):
    config_class = LrkvCohereConfig
    attention_class = LrkvCohereAttention


class LrkvCohereForCausalLM(LrkvCausal, CohereForCausalLM):
    config_class = LrkvCohereConfig
    base_class = LrkvCohereModel
