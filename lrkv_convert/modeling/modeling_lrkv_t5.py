"""T5 with LRKV attention in its decoder. Differs from transformers' T5 only in keys, values and
their cache.
"""

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5Model
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from .attention_lrkv import added_mask
from .contract_lrkv import take_cache
from .encoder_decoder_lrkv import FIELDS, LrkvDecoder, LrkvDecoderAttention
from .models_lrkv import LrkvPreTrained


class LrkvT5Config(T5Config):
    """T5Config with `lrkv` and `lrkv_cross`: base widths and ranks of decoder self- and
    cross-attention, and `lrkv_path` (see `choose_path`).
    """

    model_type = "lrkv_t5"
    lrkv: dict | None = None
    lrkv_cross: dict | None = None
    lrkv_path: str = "auto"


class LrkvT5DecoderAttention(LrkvDecoderAttention, T5Attention):
    """Nothing is scaled; the first layer's self-attention makes the relative position bias and
    hands it on. Cross-attention has none, where T5 adds zeros.
    """

    kernel = ("cross",)  # self-attention adds the position bias, head by head

    def __init__(self, config, layer_idx: int, kind: str):
        super().__init__(
            config,
            has_relative_attention_bias=kind == "self" and layer_idx == 0,
            layer_idx=layer_idx,
            is_causal=kind == "self",
        )
        self.num_layers, self.head_dim = config.num_layers, self.key_value_proj_dim
        self.take_over(
            config,
            layer_idx,
            "k",
            "v",
            name=FIELDS[kind],
            width=config.d_model,
            heads=self.n_heads,
            head_dim=self.head_dim,
        )

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs
    ):
        query, cache = self.heads_of(self.q(hidden_states)), take_cache(kwargs)
        before = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        # a static cache counts on in place
        before = before.clone() if isinstance(before, torch.Tensor) else before
        keys, values = self.cached(hidden_states, key_value_states, cache, mask)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(
                query.shape[2], keys[0].shape[2], device=query.device, past_seen_tokens=before
            )
        # flex attention has masks of its own
        if position_bias is not None and mask is not None and not isinstance(mask, torch.Tensor):
            kwargs["position_bias"] = position_bias
        elif position_bias is not None:
            mask = with_bias(mask, position_bias, query)
        output, weights = self.attend(
            query, keys, values, mask, None, cache is not None, self.dropout, **kwargs
        )
        return self.o(output), position_bias, weights


def with_bias(mask, position_bias, query):
    """Mask and position bias (1, H, T, S) as numbers to add to the scores of query (N, H, T, d);
    what is hidden stays finite in its dtype.
    """
    added = added_mask(mask, query.shape[2], position_bias.shape[-1], query.device)
    bias = position_bias.to(torch.promote_types(query.dtype, torch.float32))
    bias = bias if added is None else bias + added
    return bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)


class LrkvT5PreTrained(LrkvPreTrained):
    def _init_weights(self, module):
        # T5's own start of an attention module asks for k and v
        if not isinstance(module, LrkvT5DecoderAttention):
            return super()._init_weights(module)
        init.normal_(module.q.weight, std=(module.d_model * module.head_dim) ** -0.5)
        init.normal_(module.o.weight, std=module.inner_dim**-0.5)
        if module.has_relative_attention_bias:
            init.normal_(module.relative_attention_bias.weight, std=module.d_model**-0.5)
        return None


class LrkvT5Stack(LrkvT5PreTrained, LrkvDecoder, T5Stack):
    config_class = LrkvT5Config
    attention_class = LrkvT5DecoderAttention
    attention_names = {"self": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"}

    def decoder_layers(self) -> nn.ModuleList:
        return self.block


class LrkvT5Model(LrkvT5PreTrained, T5Model):
    config_class = LrkvT5Config

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvT5Stack(self.decoder.config)
        self.post_init()


class LrkvT5ForConditionalGeneration(LrkvT5PreTrained, T5ForConditionalGeneration):
    config_class = LrkvT5Config

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LrkvT5Stack(self.decoder.config)
        self.post_init()
