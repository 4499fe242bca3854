"""GPT-J with LRKV attention. Differs from transformers' GPT-J only in keys, values and their cache,
and RoPE turns halves of a head, whose channels were reordered accordingly.
"""

from transformers import GPTJConfig, GPTJForCausalLM, GPTJModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

from .attention_lrkv import LrkvNeighbourAttention
from .models_lrkv import LrkvCausal, LrkvNeighbourModel


class LrkvGPTJConfig(GPTJConfig):
    """GPTJConfig with `lrkv`: base widths and ranks of keys and values, per layer (see
    `low_rank_heads`), and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_gptj"
    base_model_tp_plan = None
    lrkv: dict | None = None
    lrkv_path: str = "auto"


class LrkvGPTJAttention(LrkvNeighbourAttention, GPTJAttention):
    # until transformers 5.24
    attends_itself = not getattr(GPTJModel, "_supports_attention_backend", False)
    projections = ("k_proj", "v_proj")


class LrkvGPTJModel(LrkvNeighbourModel, GPTJModel):
    config_class = LrkvGPTJConfig
    attention_class = LrkvGPTJAttention


class LrkvGPTJForCausalLM(LrkvCausal, GPTJForCausalLM):
    config_class = LrkvGPTJConfig
    base_class = LrkvGPTJModel
