"""The table of decoders. An entry says what is particular; what is not said is as in
Llama.
"""

from typing import Any

from transformers import GPTJModel

from .decoder import DecoderAdapter, Refusal, by_head, by_kind, in_quarters
from .experts import once, stacked

always = lambda config: True
biased = lambda config: bool(getattr(config, "attention_bias", False))
parameters = lambda config: getattr(config, "rope_parameters", None) or {}
layer_normed = lambda config: bool(getattr(config, "qk_layernorm", False))
whole = lambda config, d: d
# an odd number of channels is rounded up, as RoPE's tables are
share = lambda config, d: 2 * -(-int(d * parameters(config).get("partial_rotary_factor", 1.0)) // 2)


def renamed_head(tensors: dict) -> dict:
    """Old GPT-NeoX checkpoints call the output layer embed_out."""
    return once(
        (
            (
                "lm_head." + name.removeprefix("embed_out.")
                if name.startswith("embed_out.")
                else name
            ),
            held,
        )
        for name, held in tensors.items()
    )


def without_second_alibi(arguments: dict) -> dict:
    """transformers hands Falcon's eager layers a mask that has ALiBi in it already, and ALiBi once
    more.
    """
    return (
        arguments
        if arguments.get("alibi") is None
        else {**arguments, "alibi": arguments["alibi"] * 0}
    )


CUT_OFF = "keys and values are cut off after their projection there, which no factors can repeat"
PARTIAL = Refusal(
    "partial_rotary_factor",
    lambda c: parameters(c).get("partial_rotary_factor", 1.0) != 1.0,
    "whole-head RoPE is",
)
CLIPPED = Refusal("clip_qkv", lambda c: c.clip_qkv is not None, CUT_OFF)
BOTH_WAYS = Refusal(
    "bidirectional attention",
    lambda c: bool(getattr(c, "use_bidirectional_attention", False)),
    "it has no KV cache to shrink",
)
NORMED_BIAS = Refusal(
    "attention_bias", biased, "its QK-norm scales all heads alike, which a bias would not follow"
)

ROPE: dict[str, Any] = dict(rotary=whole, refuses=(PARTIAL,))
WINDOW: dict[str, Any] = dict(ROPE, positions="RoPE, sliding window")
QK_NORM: dict[str, Any] = dict(key_norm=always, norms="RMSNorm per head")
TRANSFORMER: dict[str, Any] = dict(prefix="transformer.", layers="transformer.h")
NEIGHBOURS: dict[str, Any] = dict(
    TRANSFORMER,
    attention="attn",
    output="out_proj",
    rotary=lambda c, d: c.rotary_dim,
    interleaved=True,
    # until transformers 5.24
    tuples=not getattr(GPTJModel, "_supports_attention_backend", False),
    positions="RoPE on neighbouring channels, of a part of each head",
)
ALIBI: dict[str, Any] = dict(tuples=True, positions="ALiBi")

DECODERS = (
    DecoderAdapter(
        "llama",
        models="Llama 1-3, CodeLlama, SmolLM",
        biased=biased,
        **{**ROPE, "positions": "RoPE, all scaling variants"},
    ),
    DecoderAdapter("mistral", models="Mistral", **WINDOW),
    DecoderAdapter("mixtral", models="Mixtral (experts untouched)", stored=stacked, **WINDOW),
    DecoderAdapter("qwen2", models="Qwen1.5, 2, 2.5", biased=always, **WINDOW),
    DecoderAdapter(
        "qwen2_moe",
        models="Qwen1.5-MoE, Qwen2-MoE (experts untouched)",
        biased=lambda c: c.qkv_bias,
        stored=stacked,
        **WINDOW,
    ),
    DecoderAdapter("qwen3", models="Qwen3", biased=biased, **WINDOW, **QK_NORM),
    DecoderAdapter(
        "qwen3_moe",
        models="Qwen3-MoE (experts untouched)",
        biased=biased,
        stored=stacked,
        **WINDOW,
        **QK_NORM,
    ),
    DecoderAdapter(
        "smollm3",
        models="SmolLM3",
        biased=biased,
        rotates=lambda c, layer: bool(c.no_rope_layers[layer]),
        **{**ROPE, "positions": "RoPE, none in some layers"},
    ),
    DecoderAdapter("olmo", models="OLMo", biased=biased, rotary=whole, refuses=(PARTIAL, CLIPPED)),
    DecoderAdapter(
        "olmo2",
        models="OLMo-2",
        rotary=whole,
        key_norm=always,
        norms="RMSNorm over all heads",
        refuses=(PARTIAL, NORMED_BIAS),
    ),
    DecoderAdapter(
        "gemma", models="Gemma 7B", biased=biased, rotary=whole, refuses=(PARTIAL, BOTH_WAYS)
    ),
    DecoderAdapter(
        "gemma2",
        models="Gemma 2",
        biased=biased,
        rotary=whole,
        positions="RoPE, sliding layers, soft cap",
        refuses=(PARTIAL, BOTH_WAYS),
    ),
    DecoderAdapter(
        "gemma3_text",
        models="text towers of Gemma 3 on their own",
        biased=biased,
        rotary=whole,
        positions="RoPE of two kinds, sliding layers",
        refuses=(PARTIAL, BOTH_WAYS),
        **QK_NORM,
    ),
    DecoderAdapter(
        "phi",
        models="Phi-1.5, Phi-2",
        output="dense",
        biased=always,
        rotary=share,
        key_norm=layer_normed,
        positions="RoPE on a part of each head",
        norms="none, or LayerNorm",
    ),
    DecoderAdapter(
        "phi3",
        models="Phi-3, Phi-4",
        projections=("qkv_proj",),
        layout=by_kind,
        rotary=share,
        positions="RoPE, also on a part, longrope",
    ),
    DecoderAdapter(
        "stablelm",
        models="StableLM",
        biased=lambda c: c.use_qkv_bias,
        rotary=share,
        key_norm=layer_normed,
        positions="RoPE on a part of each head",
        norms="none, or LayerNorm per head",
    ),
    DecoderAdapter(
        "gpt_neox",
        models="GPT-NeoX, Pythia",
        prefix="gpt_neox.",
        layers="gpt_neox.layers",
        attention="attention",
        output="dense",
        projections=("query_key_value",),
        layout=by_head,
        biased=biased,
        rotary=share,
        positions="RoPE on a part of each head",
        stored=renamed_head,
    ),
    DecoderAdapter("gptj", models="GPT-J", **NEIGHBOURS),
    DecoderAdapter(
        "codegen", models="CodeGen", projections=("qkv_proj",), layout=in_quarters, **NEIGHBOURS
    ),
    DecoderAdapter(
        "cohere",
        models="Command R",
        biased=biased,
        interleaved=True,
        key_norm=lambda c: c.use_qk_norm,
        norm_weights=("q_norm", "k_norm"),
        **{**ROPE, "positions": "RoPE on neighbouring channels"},
        norms="none, or LayerNorm per head",
    ),
    DecoderAdapter(
        "gpt2",
        models="GPT-2",
        **TRANSFORMER,
        attention="attn",
        output="c_proj",
        projections=("c_attn",),
        layout=by_kind,
        query="q_attn",
        transposed=True,
        biased=always,
        positions="learned",
        refuses=(
            Refusal("cross-attention", lambda c: c.add_cross_attention, "decoder-only GPT-2 is"),
            Refusal(
                "reorder_and_upcast_attn",
                lambda c: c.reorder_and_upcast_attn,
                "set it to false in config.json; it changes rounding only",
            ),
        ),
    ),
    DecoderAdapter(
        "gpt_neo",
        models="GPT-Neo",
        **TRANSFORMER,
        attention="attn.attention",
        output="out_proj",
        tuples=True,
        positions="learned, local layers",
        refuses=(
            Refusal(
                "window_size below 1",
                lambda c: c.window_size < 1,
                "a local layer reads at least the token it stands on",
            ),
        ),
    ),
    DecoderAdapter(
        "opt",
        models="OPT",
        layers="model.decoder.layers",
        output="out_proj",
        biased=lambda c: c.enable_bias,
        positions="learned",
    ),
    DecoderAdapter(
        "bloom",
        models="BLOOM",
        **TRANSFORMER,
        **ALIBI,
        attention="self_attention",
        output="dense",
        projections=("query_key_value",),
        layout=by_head,
        biased=always,
        refuses=(
            Refusal(
                "slow_but_exact",
                lambda c: c.pretraining_tp > 1 and c.slow_but_exact,
                "set it to false in config.json; it leaves the output's bias out",
            ),
        ),
    ),
    DecoderAdapter(
        "mpt",
        models="MPT",
        prefix="transformer.",
        layers="transformer.blocks",
        attention="attn",
        output="out_proj",
        projections=("Wqkv",),
        layout=by_kind,
        **ALIBI,
        refuses=(
            Refusal("clip_qkv", lambda c: c.attn_config.clip_qkv, CUT_OFF),
            Refusal("qk_ln", lambda c: c.attn_config.qk_ln, "transformers' own MPT leaves it out"),
            Refusal(
                "no alibi",
                lambda c: not c.attn_config.alibi,
                "transformers' own MPT adds ALiBi all the same",
            ),
        ),
    ),
    DecoderAdapter(
        "falcon",
        models="Falcon-RW, Falcon 40B",
        **TRANSFORMER,
        attention="self_attention",
        output="dense",
        projections=("query_key_value",),
        layout=by_head,
        biased=lambda c: c.bias,
        rotary=lambda c, d: 0 if c.alibi else d,
        arguments=without_second_alibi,
        tuples=True,
        positions="RoPE or ALiBi",
        kv_heads=lambda c: (
            1 if c.multi_query and not c.new_decoder_architecture else c.num_kv_heads
        ),
    ),
)
