"""CodeGen with LRKV attention. Differs from transformers' CodeGen only in keys, values and their cache, and RoPE turns halves of a head, whose channels were
reordered accordingly."""
import torch
from transformers import CodeGenConfig, CodeGenForCausalLM, CodeGenModel
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from .attention_lrkv import LrkvAttention, LrkvCausal, LrkvRotaryModel


class LrkvCodeGenConfig(CodeGenConfig):
    """CodeGenConfig with `lrkv`: base widths and ranks of keys and values, per layer (see `low_rank_heads`), and `lrkv_path` (see `choose_path`)."""

    model_type = "lrkv_codegen"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvCodeGenAttention(LrkvAttention, CodeGenAttention):
    float32_scores, interleaved = True, False       # `rotation` gives its tables for halves

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.scaling = config, self.head_dim ** -0.5
        self.take_over(config, layer_idx, "qkv_proj")

    def rotation(self, positions, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) (N, T, rotary_dim) of positions (N, T)."""
        sin, cos = self.embed_positions.to(positions.device)[positions].to(dtype).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        rotations = getattr(layer_past, "lrkv_rotations", None)
        given = self.rotation(position_ids, hidden_states.dtype) if rotations is None else None
        output, weights = self.factored_attention(self.heads_of(self.q_proj(hidden_states)), hidden_states, attention_mask, layer_past,
                                                  (given, given) if rotations is None else rotations["full_attention"], self.attn_dropout.p)
        return self.resid_dropout(self.out_proj(output)), weights


class LrkvCodeGenModel(LrkvRotaryModel, CodeGenModel):
    config_class = LrkvCodeGenConfig
    attention_class = LrkvCodeGenAttention
    attention_name = "attn"
    hands_on = False

    def rotation(self, x, positions, kind):
        return self.h[0].attn.rotation(positions, x.dtype)

    def decoder_layers(self):
        return self.h


class LrkvCodeGenForCausalLM(LrkvCausal, CodeGenForCausalLM):
    config_class = LrkvCodeGenConfig
    base_class = LrkvCodeGenModel
