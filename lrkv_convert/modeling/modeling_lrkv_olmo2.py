"""OLMo-2 with LRKV attention. Differs from transformers' OLMo-2 only in keys, values and their
cache.
"""

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

from .attention_lrkv import LrkvRotaryAttention
from .factors_lrkv import rotate
from .models_lrkv import LrkvCausal, LrkvRotaryModel


class LrkvOlmo2Config(Olmo2Config):
    """Olmo2Config with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_olmo2"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvOlmo2Attention(LrkvRotaryAttention, Olmo2Attention):
    kernel = ()  # the norm goes over all heads
    takes_codes = False  # its scale comes after the latents
    # The norm of keys goes over all heads at once. A token's scale is therefore one number, which
    # what is cached takes on; the weights come later.

    def encode_keys(self, hidden_states, rotation, through=False):
        cached = self.keys.project(hidden_states)
        scale = self._scale(self.keys.rebuild(cached))
        cached = tuple(slot * scale for slot in cached)
        if self.keys.rotates_on_read:
            return cached
        # whole heads, then
        base, heads = cached
        heads = self._weighted(heads)
        return base, heads if rotation is None else rotate(heads, rotation)

    def key_norm(self):
        return self._weighted

    def normalised(self, query):
        return self.heads_of(self.q_norm(query.transpose(1, 2).flatten(2)))

    def _scale(self, keys):
        """1 / sqrt(mean k^2 + eps) over heads and channels of keys (N, H, T, d): (N, 1, T, 1)."""
        squares = keys.to(torch.float32).square().mean((1, 3), keepdim=True)
        return torch.rsqrt(squares + self.k_norm.variance_epsilon).to(keys.dtype)

    def _weighted(self, keys):
        return keys * self.k_norm.weight.view(self.keys.num_heads, 1, -1)


class LrkvOlmo2Model(LrkvRotaryModel, Olmo2Model):
    config_class = LrkvOlmo2Config
    attention_class = LrkvOlmo2Attention


class LrkvOlmo2ForCausalLM(LrkvCausal, Olmo2ForCausalLM):
    config_class = LrkvOlmo2Config
    base_class = LrkvOlmo2Model
