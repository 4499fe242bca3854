"""Gemma 3 (text) with LRKV attention. Differs from transformers' Gemma 3 (text) only in keys,
values and their cache.
"""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from .attention_lrkv import KernelNorm, LrkvRotaryAttention
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvGemma3TextConfig(Gemma3TextConfig):
    """Gemma3TextConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gemma3_text"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGemma3TextAttention(LrkvRotaryAttention, Gemma3Attention):
    def extra_arguments(self) -> dict:
        return {"sliding_window": self.sliding_window}

    def kernel_norm(self):
        return KernelNorm(1.0 + self.k_norm.weight.to(torch.float32), self.k_norm.eps)


class LrkvGemma3TextModel(LrkvRotaryModel, Gemma3TextModel):
    config_class = LrkvGemma3TextConfig
    attention_class = LrkvGemma3TextAttention

    def rotation(self, x, positions, kind):
        return self.rotary_emb(x, positions, kind)


class LrkvGemma3TextForCausalLM(LrkvCausal, Gemma3ForCausalLM):
    config_class = LrkvGemma3TextConfig
    base_class = LrkvGemma3TextModel
