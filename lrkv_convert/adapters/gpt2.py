"""GPT-2: q, k, v fused in one Conv1D (weights (in, out)) with biases, learned positions, true multi-head attention."""
from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry, heads


class GPT2Adapter(Adapter):
    model_type, modeling = "gpt2", "modeling_lrkv_gpt2"
    prefix, layer_path, attention, output, key_projection = "transformer.", "transformer.h", "attn", "c_proj", "c_attn"

    def geometry(self, config) -> Geometry:
        H = config.num_attention_heads
        return Geometry(config.num_hidden_layers, config.hidden_size, H, 1, config.hidden_size // H, rotary=False)

    def refuse(self, config) -> None:
        if config.add_cross_attention:
            raise LrkvError("GPT-2 with cross-attention is not supported", "decoder-only GPT-2 is")
        if config.reorder_and_upcast_attn:
            raise LrkvError("GPT-2 with reorder_and_upcast_attn is not supported", "set it to false in config.json; it changes rounding only")

    def key_columns(self, geometry: Geometry) -> slice:
        return slice(geometry.width, 2 * geometry.width)

    def split(self, read, layer: int, config) -> AttentionWeights:
        g, at = self.geometry(config), self.module(layer)
        q, k, v = read(f"{at}c_attn.weight").chunk(3, dim=1)                                # (D, D) each
        b_q, b_k, b_v = read(f"{at}c_attn.bias").view(3, g.kv_heads, g.head_dim)
        return AttentionWeights(
            W_Q=heads(q, g.kv_heads, 1), W_K=heads(k, g.kv_heads), W_V=heads(v, g.kv_heads),
            W_O=read(f"{at}c_proj.weight").view(g.kv_heads, 1, g.head_dim, -1), b_Q=b_q.unsqueeze(1), b_K=b_k, b_V=b_v)

    def join(self, weights: AttentionWeights) -> dict:
        D = weights.W_Q.shape[2]
        return {"q_attn.weight": weights.W_Q.permute(2, 0, 1, 3).reshape(D, -1), "q_attn.bias": weights.b_Q.reshape(-1),
                "c_proj.weight": weights.W_O.reshape(-1, weights.W_O.shape[-1])}

    def queries(self, tensors: dict, geometry: Geometry):
        return heads(tensors["q_attn.weight"], geometry.kv_heads, 1)
