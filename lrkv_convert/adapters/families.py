"""The table of decoder families. An entry says what is particular; what is not said is as in Llama."""
from .decoder import DecoderAdapter, by_head, by_kind, in_quarters
from .experts import stacked

always = lambda config: True
biased = lambda config: bool(getattr(config, "attention_bias", False))
whole = lambda config, d: d
parameters = lambda config: getattr(config, "rope_parameters", None) or {}
share = lambda config, d: 2 * -(-int(d * parameters(config).get("partial_rotary_factor", 1.0)) // 2)       # an odd number of channels is rounded up, as RoPE's tables are
rotary_dim = lambda config, d: config.rotary_dim
layer_normed = lambda config: bool(getattr(config, "qk_layernorm", False))

PARTIAL = (lambda c: parameters(c).get("partial_rotary_factor", 1.0) != 1.0, "{0.model_type} with partial_rotary_factor {0.rope_parameters[partial_rotary_factor]} is not supported",
           "whole-head RoPE is")
CLIPPED = (lambda c: getattr(c, "clip_qkv", None) is not None, "{0.model_type} with clip_qkv {0.clip_qkv} is not supported",
           "keys and values are cut off after their projection there, which no factors can repeat; models without clip_qkv are supported")
BOTH_WAYS = (lambda c: bool(getattr(c, "use_bidirectional_attention", False)), "{0.model_type} with bidirectional attention is not supported",
             "it has no KV cache to shrink")
ROPE = dict(rotary=whole, refuses=(PARTIAL,))
QK_NORM = dict(key_norm=always, norms="RMSNorm per head")
TRANSFORMER = dict(prefix="transformer.", layers="transformer.h")
NEIGHBOURS = dict(TRANSFORMER, attention="attn", output="out_proj", rotary=rotary_dim, interleaved=True, legacy=True, positions="RoPE on part, neighbouring channels",
                  refuses=((lambda c: not c.rotary_dim, "{0.model_type} without rotary_dim is not supported", "give the number of channels RoPE turns in config.json"),))

FAMILIES = (
    DecoderAdapter("llama", biased=biased, **ROPE),
    DecoderAdapter("mistral", **ROPE),
    DecoderAdapter("mixtral", stored=stacked, **ROPE),
    DecoderAdapter("qwen2", biased=always, **ROPE),
    DecoderAdapter("qwen2_moe", biased=lambda c: c.qkv_bias, stored=stacked, **ROPE),
    DecoderAdapter("qwen3", biased=biased, **ROPE, **QK_NORM),
    DecoderAdapter("qwen3_moe", biased=biased, stored=stacked, **ROPE, **QK_NORM),
    DecoderAdapter("olmo", biased=biased, rotary=whole, refuses=(PARTIAL, CLIPPED)),
    DecoderAdapter("olmo2", rotary=whole, key_norm=always, norms="RMSNorm over all heads", refuses=(PARTIAL, (
        biased, "olmo2 with attention_bias is not supported", "its QK-norm scales all heads alike, which a bias would not follow"))),
    DecoderAdapter("gemma", biased=biased, rotary=whole, refuses=(PARTIAL, BOTH_WAYS)),
    DecoderAdapter("gemma2", biased=biased, rotary=whole, refuses=(PARTIAL, BOTH_WAYS)),
    DecoderAdapter("gemma3_text", biased=biased, rotary=whole, refuses=(PARTIAL, BOTH_WAYS), **QK_NORM),
    DecoderAdapter("phi", output="dense", biased=always, rotary=share, key_norm=layer_normed, positions="RoPE on part", norms="none, or LayerNorm per head"),
    DecoderAdapter("phi3", projections=("qkv_proj",), layout=by_kind, rotary=share, positions="RoPE, also on part, longrope"),
    DecoderAdapter("stablelm", biased=lambda c: c.use_qkv_bias, rotary=share, key_norm=layer_normed, positions="RoPE on part", norms="none, or LayerNorm of each head"),
    DecoderAdapter("gpt_neox", prefix="gpt_neox.", layers="gpt_neox.layers", attention="attention", output="dense", projections=("query_key_value",), layout=by_head,
                   biased=biased, rotary=share, positions="RoPE on part",
                   stored=lambda tensors: {"lm_head" + name.removeprefix("embed_out") if name.startswith("embed_out.") else name: held for name, held in tensors.items()}),
    DecoderAdapter("gptj", **NEIGHBOURS),
    DecoderAdapter("codegen", projections=("qkv_proj",), layout=in_quarters, **NEIGHBOURS),
    DecoderAdapter("cohere", biased=biased, rotary=whole, interleaved=True, key_norm=lambda c: c.use_qk_norm, norm_weights=("q_norm", "k_norm"), refuses=(PARTIAL,),
                   positions="RoPE, neighbouring channels", norms="none, or LayerNorm of each head"),
    DecoderAdapter("gpt2", **TRANSFORMER, attention="attn", output="c_proj", projections=("c_attn",), layout=by_kind, query="q_attn", transposed=True, biased=always,
                   positions="learned", refuses=(
        (lambda c: c.add_cross_attention, "GPT-2 with cross-attention is not supported", "decoder-only GPT-2 is"),
        (lambda c: c.reorder_and_upcast_attn, "GPT-2 with reorder_and_upcast_attn is not supported", "set it to false in config.json; it changes rounding only"))),
    DecoderAdapter("gpt_neo", **TRANSFORMER, attention="attn.attention", output="out_proj", legacy=True, positions="learned, local layers"),
    DecoderAdapter("opt", layers="model.decoder.layers", output="out_proj", biased=lambda c: c.enable_bias, positions="learned"),
    DecoderAdapter("bloom", **TRANSFORMER, attention="self_attention", output="dense", projections=("query_key_value",), layout=by_head, biased=always, legacy=True,
                   positions="ALiBi"),
    DecoderAdapter("mpt", prefix="transformer.", layers="transformer.blocks", attention="attn", output="out_proj", projections=("Wqkv",), layout=by_kind, legacy=True,
                   positions="ALiBi", refuses=(
        (lambda c: c.attn_config.clip_qkv, "mpt with clip_qkv {0.attn_config.clip_qkv} is not supported", CLIPPED[2]),)),
    DecoderAdapter("falcon", **TRANSFORMER, attention="self_attention", output="dense", projections=("query_key_value",), layout=by_head, biased=lambda c: c.bias,
                   rotary=lambda c, d: 0 if c.alibi else d, legacy=True, positions="RoPE or ALiBi",
                   kv_heads=lambda c: c.num_kv_heads if c.new_decoder_architecture else 1 if c.multi_query else c.num_attention_heads,
                   # transformers hands eager layers a mask that has ALiBi in it already, and ALiBi once more
                   arguments=lambda a: a if a.get("alibi") is None else {**a, "alibi": a["alibi"] * 0}),
)
