"""What a conversion did to each head: original and converted attention on the same inputs.

The original is run on examples, layer by layer as calibration does, and each converted attention
module is fed what the original's own is fed, so that every error is its own and none is inherited
from the layers before. Per query head h, over all queries t:

    logit error     |l - l'| / |l|, l the scores q k^T / sqrt(d) of a query, centred over the keys
                    it sees: softmax ignores a constant
    attention KL    mean over t of KL(softmax l || softmax l'), nats
    similarity      s(A_h, A'_h), A_h = W_Q,h W_K,h^T, from the weights alone (diversity.py)

and per layer the output error |o - o'| / |o| of the whole module, its output projection included.
Scores are independent of the family because both models attend through `probe`, which is eager
attention that gives its scores where others give their weights. In cross-attention the keys a query
sees are the positions of the encoder. Shapes: n query heads, T tokens, S keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..examples.example import Example
from ..families import AttentionWeights, Site
from ..source.skeleton import Skeleton, first_of
from .diversity import gram, similarity

PROBE = "lrkv_probe"


def probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers: query (N, n, T, d), key and value (N, H, S, d) after
    RoPE -> output (N, T, n, d) and, in the place of the weights, the float32 scores (N, n, T, S),
    -inf where nothing is seen. attention_mask: as made for eager attention, numbers to add to the
    scores, of which the smallest there are hide; position_bias: what T5 adds beside it. A converted
    T5 adds the two up before.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias.float()
    if attention_mask is not None:
        scores = (scores + attention_mask.float()).masked_fill(
            attention_mask <= torch.finfo(attention_mask.dtype).min, -torch.inf
        )
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous(), scores


ALL_ATTENTION_FUNCTIONS.register(PROBE, probe)
# a function without a mask of its own would be given none
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, eager_mask)


@dataclass(frozen=True)
class LayerFidelity:
    """One layer. similarity, logit_error, kl (n,): per query head; output_error: of the layer;
    original, converted (n, n): the Gram matrices [s_ij].
    """

    similarity: Tensor
    logit_error: Tensor
    kl: Tensor
    output_error: float
    original: Tensor
    converted: Tensor


class ErrorSums:
    """Adds up the errors of one layer over examples. float64."""

    def __init__(self, heads: int):
        self.missed, self.size, self.kl = (
            torch.zeros(heads, dtype=torch.float64) for _ in range(3)
        )
        self.output_missed, self.output_size, self.queries = 0.0, 0.0, 0

    def add(self, original: tuple[Tensor, Tensor], converted: tuple[Tensor, Tensor]) -> None:
        """original, converted: what the attention modules give, output (1, T, D) and scores (1, n,
        T, S).
        """
        (output, scores), (other_output, other_scores) = original, converted
        # (n, T, S)
        seen = scores[0].isfinite()
        centre = lambda s: torch.where(
            seen,
            s - (torch.where(seen, s, 0.0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)),
            0.0,
        )
        wanted = centre(scores[0].double())
        self.missed += (wanted - centre(other_scores[0].double())).square().sum((1, 2)).cpu()
        self.size += wanted.square().sum((1, 2)).cpu()
        logp, other = (s[0].double().log_softmax(-1) for s in (scores, other_scores))
        self.kl += torch.where(seen, logp.exp() * (logp - other), 0.0).sum((1, 2)).cpu()
        self.output_missed += (output - other_output).double().square().sum().item()
        self.output_size += output.double().square().sum().item()
        self.queries += scores.shape[2]


@torch.no_grad()
def fidelity(
    skeleton: Skeleton,
    sites: Sequence[Site],
    converted: PreTrainedModel,
    examples: Sequence[Example],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[Site, LayerFidelity]:
    """Compare every one of these attention modules of a converted model (float32, in memory) with
    its original (streamed) on examples.
    """
    states, found = skeleton.encode(examples) or [None] * len(examples), {}
    hidden, call = skeleton.embed(examples)
    for config in (*_configs(skeleton.model), *_configs(converted)):
        config._attn_implementation = PROBE
    for config in _configs(converted):
        config.lrkv_path = "rebuild"
    for i in range(len(skeleton.layers)):
        watches = [Watch(site, converted) for site in sites if site.layer == i]
        with skeleton.layer(i) as layer:
            hooks = [
                layer.get_submodule(watch.site.adapter.attention).register_forward_hook(
                    watch.see, with_kwargs=True
                )
                for watch in watches
            ]
            for n, h in enumerate(hidden):
                args, kwargs = call(i, h.shape[1], states[n])
                hidden[n] = first_of(layer(h, *args, **kwargs))
            for hook in hooks:
                hook.remove()
        for watch in watches:
            found[watch.site] = watch.summary(skeleton)
        progress(i + 1, len(skeleton.layers))
    return found


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Those that the parts of a model read: stacks of an encoder-decoder may have one each."""
    found = [getattr(part, "config", None) for part in model.modules()]
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


class Watch:
    """One attention module of the original, and the converted one in its place, on the same
    inputs.
    """

    def __init__(self, site: Site, converted: PreTrainedModel):
        self.site = site
        self.other: Any = converted.get_submodule(site.path)
        self.sums = ErrorSums(site.geometry.kv_heads * site.geometry.groups)

    def see(self, module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        """A forward hook: output first, scores last."""
        other = self.other(*args, **kwargs)
        self.sums.add((output[0], output[-1]), (other[0], other[-1]))

    def summary(self, skeleton: Skeleton) -> LayerFidelity:
        site, config = self.site, skeleton.checkpoint.config
        weights = site.adapter.split(skeleton.tensor, site.layer, config).to(skeleton.device)
        W_Q = site.adapter.queries(dict(self.other.named_parameters()), site.geometry)
        return _summary(self.sums, weights, W_Q, self.other.keys.matrices())


def _summary(sums: ErrorSums, weights: AttentionWeights, W_Q: Tensor, W_K: Tensor) -> LayerFidelity:
    """W_Q (H, G, D, d), W_K (H, D, d): of the converted layer. A base in another gauge has its
    inverse in W_Q, so that A_h is what it was.
    """
    tiny = torch.finfo(torch.float64).tiny
    return LayerFidelity(
        similarity(weights.W_Q, weights.W_K, W_Q, W_K).cpu(),
        (sums.missed / sums.size.clamp_min(tiny)).sqrt(),
        sums.kl / sums.queries,
        (sums.output_missed / max(sums.output_size, tiny)) ** 0.5,
        gram(weights.W_Q, weights.W_K).cpu(),
        gram(W_Q, W_K).cpu(),
    )
