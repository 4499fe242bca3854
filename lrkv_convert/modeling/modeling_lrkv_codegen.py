"""CodeGen with LRKV attention. Differs from transformers' CodeGen only in keys, values and their
cache, and RoPE turns halves of a head, whose channels were reordered accordingly.
"""

from transformers import CodeGenConfig, CodeGenForCausalLM, CodeGenModel
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from .attention_lrkv import LrkvNeighbourAttention
from .models_lrkv import LrkvCausal, LrkvNeighbourModel


class LrkvCodeGenConfig(CodeGenConfig):
    """CodeGenConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_codegen"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvCodeGenAttention(LrkvNeighbourAttention, CodeGenAttention):
    # until transformers 5.24
    attends_itself = not getattr(CodeGenModel, "_supports_attention_backend", False)
    projections = ("qkv_proj",)


class LrkvCodeGenModel(LrkvNeighbourModel, CodeGenModel):
    config_class = LrkvCodeGenConfig
    attention_class = LrkvCodeGenAttention


class LrkvCodeGenForCausalLM(LrkvCausal, CodeGenForCausalLM):
    config_class = LrkvCodeGenConfig
    base_class = LrkvCodeGenModel
