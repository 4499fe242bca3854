"""Llama-shaped attention: q_proj, k_proj, v_proj, o_proj as Linear (weights (out, in)), RoPE, MHA or GQA, biases where the config says so."""
from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry, heads


class LlamaAdapter(Adapter):
    prefix, layer_path, attention, output, key_projection = "model.", "model.layers", "self_attn", "o_proj", "k_proj"

    def __init__(self, model_type: str, biased: str = "never"):
        """biased: "never", "qkv" (Qwen2) or "config" (all four, where config.attention_bias says so)."""
        self.model_type, self.modeling, self.biased = model_type, f"modeling_lrkv_{model_type}", biased

    def geometry(self, config) -> Geometry:
        H, head_dim = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Geometry(config.num_hidden_layers, config.hidden_size, H, config.num_attention_heads // H, head_dim, rotary=True)

    def refuse(self, config) -> None:
        partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise LrkvError(f"{self.model_type} with partial_rotary_factor {partial} is not supported", "whole-head RoPE is")

    def _biases(self, config) -> str:
        return {"never": "", "qkv": "qkv", "config": "qkvo" if getattr(config, "attention_bias", False) else ""}[self.biased]

    def split(self, read, layer: int, config) -> AttentionWeights:
        g, at, biased = self.geometry(config), self.module(layer), self._biases(config)
        weight = lambda p: read(f"{at}{p}_proj.weight").T                                   # (in, out)
        bias = lambda p, *shape: read(f"{at}{p}_proj.bias").view(*shape, g.head_dim) if p in biased else None
        return AttentionWeights(
            W_Q=heads(weight("q"), g.kv_heads, g.groups), W_K=heads(weight("k"), g.kv_heads), W_V=heads(weight("v"), g.kv_heads),
            W_O=weight("o").reshape(g.kv_heads, g.groups, g.head_dim, -1),
            b_Q=bias("q", g.kv_heads, g.groups), b_K=bias("k", g.kv_heads), b_V=bias("v", g.kv_heads))

    def join(self, weights: AttentionWeights) -> dict:
        D = weights.W_Q.shape[2]
        tensors = {"q_proj.weight": weights.W_Q.permute(0, 1, 3, 2).reshape(-1, D), "o_proj.weight": weights.W_O.reshape(-1, weights.W_O.shape[-1]).T}
        if weights.b_Q is not None:
            tensors["q_proj.bias"] = weights.b_Q.reshape(-1)
        return tensors

    def queries(self, tensors: dict, geometry: Geometry):
        return heads(tensors["q_proj.weight"].T, geometry.kv_heads, geometry.groups)
