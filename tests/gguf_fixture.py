"""Write a tiny Llama as GGUF, float32, the way llama.cpp's converter does (q and k rows permuted to
interleaved RoPE).
"""

from types import MappingProxyType

import torch
from tokenizers import pre_tokenizers


def write_gguf(
    gguf, model, path, keys=lambda writer: None, tensors=MappingProxyType({}), left_out: tuple = ()
) -> None:
    """keys: adds more metadata; tensors: more of them, by their names in the file; left_out: those
    of the model that are not written.
    """
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, "<s>", "</s>", "<pad>", bytes_[0] + bytes_[1]]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    keys(writer)

    def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return (
            weight.view(heads, 2, weight.shape[0] // heads // 2, -1)
            .swapaxes(1, 2)
            .reshape(weight.shape)
        )

    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float()
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            place = places[rest.removesuffix(".weight")]
            if place in ("attn_q", "attn_k"):
                tensor = permute(
                    tensor,
                    config.num_attention_heads if place == "attn_q" else config.num_key_value_heads,
                )
            name = f"blk.{i}.{place}.weight"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        if name not in left_out:
            writer.add_tensor(name, tensor.contiguous().numpy())
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
