"""One row per family and variant: a tiny model of odd sizes, 3 KV heads of width 20 unless the
family forbids it. A new family is a new row.
"""

from transformers import (
    BloomConfig,
    CodeGenConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

COMMON = dict(
    vocab_size=260, bos_token_id=256, eos_token_id=257, pad_token_id=258, initializer_range=0.2
)
SHARED = dict(
    COMMON, num_hidden_layers=2, hidden_size=48, num_attention_heads=6, max_position_embeddings=640
)
ROPE = dict(SHARED, intermediate_size=64, num_key_value_heads=3, head_dim=20)
# families without a head_dim of their own
SQUARE = dict(SHARED, num_attention_heads=3, hidden_size=60)
EXPERTS = dict(ROPE, moe_intermediate_size=24, num_experts_per_tok=2)
NO_DROPOUT = dict(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 160,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 10 for i in range(10)],
    "long_factor": [2.0 + i for i in range(10)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
}
HALF = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**ROPE),
    "llama-bias": lambda: LlamaConfig(**ROPE, attention_bias=True, tie_word_embeddings=True),
    "llama-mha-yarn": lambda: LlamaConfig(
        **{**ROPE, "num_attention_heads": 3}, rope_parameters=YARN
    ),
    "mistral": lambda: MistralConfig(**ROPE, sliding_window=24),
    "mixtral": lambda: MixtralConfig(
        **ROPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen2": lambda: Qwen2Config(
        **{**ROPE, "num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **EXPERTS, num_experts=4, shared_expert_intermediate_size=32
    ),
    "qwen3": lambda: Qwen3Config(**ROPE),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, num_experts=4, sliding_window=None),
    "smollm3": lambda: SmolLM3Config(**{**ROPE, "num_hidden_layers": 3}, no_rope_layers=[1, 0, 1]),
    "olmo": lambda: OlmoConfig(**ROPE),
    "olmo2": lambda: Olmo2Config(**ROPE),
    "gemma": lambda: GemmaConfig(**ROPE),
    "gemma2": lambda: Gemma2Config(
        **ROPE, sliding_window=24, query_pre_attn_scalar=12, attn_logit_softcapping=5.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **{**ROPE, "num_hidden_layers": 3},
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": lambda: PhiConfig(
        **SQUARE,
        **HALF,
        intermediate_size=64,
        num_key_value_heads=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    "phi-norm": lambda: PhiConfig(
        **SQUARE, **HALF, intermediate_size=64, qk_layernorm=True, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "phi-tied": lambda: PhiConfig(
        **SQUARE,
        **HALF,
        intermediate_size=64,
        num_key_value_heads=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        tie_word_embeddings=True,
    ),
    "phi3": lambda: Phi3Config(**ROPE, resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3-longrope": lambda: Phi3Config(
        **SQUARE,
        num_key_value_heads=3,
        intermediate_size=64,
        resid_pdrop=0.0,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=64,
    ),
    "stablelm": lambda: StableLmConfig(
        **SQUARE, **HALF, intermediate_size=64, num_key_value_heads=3, use_qkv_bias=True
    ),
    "stablelm-norm": lambda: StableLmConfig(
        **SQUARE, **HALF, intermediate_size=64, num_key_value_heads=3, qk_layernorm=True
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SQUARE, **HALF, intermediate_size=64, attention_bias=True),
    "cohere": lambda: CohereConfig(**ROPE),
    "cohere-norm": lambda: CohereConfig(**ROPE, use_qk_norm=True),
    "gptj": lambda: GPTJConfig(
        **COMMON,
        **NO_DROPOUT,
        n_layer=2,
        n_embd=60,
        n_head=3,
        n_positions=640,
        rotary_dim=8,
        n_inner=64,
    ),
    "codegen": lambda: CodeGenConfig(
        **COMMON,
        **NO_DROPOUT,
        n_layer=2,
        n_embd=80,
        n_head=4,
        n_positions=640,
        rotary_dim=8,
        n_inner=64,
    ),
    "gpt2": lambda: GPT2Config(**SQUARE, **NO_DROPOUT),
    "gpt_neo": lambda: GPTNeoConfig(
        **COMMON,
        num_layers=2,
        hidden_size=60,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=640,
        intermediate_size=64,
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
    ),
    "opt": lambda: OPTConfig(**SQUARE, ffn_dim=64, word_embed_proj_dim=60, dropout=0.0),
    "opt-350m": lambda: OPTConfig(
        **SQUARE, ffn_dim=64, word_embed_proj_dim=24, do_layer_norm_before=False, dropout=0.0
    ),
    "bloom": lambda: BloomConfig(
        **COMMON, hidden_size=60, n_layer=2, n_head=3, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "mpt": lambda: MptConfig(
        **COMMON, d_model=60, n_heads=3, n_layers=2, expansion_ratio=2, max_seq_len=640
    ),
    "falcon": lambda: FalconConfig(
        **SQUARE,
        ffn_hidden_size=64,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        new_decoder_architecture=False,
        hidden_dropout=0.0,
    ),
    "falcon-rope": lambda: FalconConfig(
        **{**SQUARE, "num_attention_heads": 6, "hidden_size": 120},
        ffn_hidden_size=64,
        alibi=False,
        num_kv_heads=3,
        new_decoder_architecture=True,
        hidden_dropout=0.0,
    ),
}
