"""How much the loss minds an error in each head's keys and values: second moments of the gradient, layer by layer.

For a small change of the logits, KL(original || changed) = 1/2 E (g . delta)^2, with g the gradient of the log-probability of a token drawn
from the model itself (the Fisher information). So the metric of the heads (metrics.py) is, per token,

    keys     M_h = E g g^T      g: gradient at the key before rotation, which carries RoPE and the softmax exactly
    values   M_h = E g g^T      g: gradient at the head's output, summed over the group

in place of E q q^T and W_O W_O^T, which know nothing of what comes after the layer. Being in nats, they also compare layers with each other,
which is what spending a byte budget needs (allocate.py). Hidden states of a few windows are kept per layer; each layer is then run once more,
last to first, with one layer's graph in memory at a time.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .adapters import Geometry
from .calibrate import Skeleton
from .metrics import HeadMoments

WINDOWS = 8     # of the calibration windows: second moments of d numbers settle within a few thousand tokens
SEED = 0        # of the tokens drawn from the model


def head_moments(skeleton: Skeleton, geometry: Geometry, tokens: Tensor, progress: Callable[[int, int], None] = lambda *_: None) -> list[HeadMoments]:
    """HeadMoments of every layer, first to last. tokens (n, T): WINDOWS of them are used, spread evenly."""
    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(WINDOWS, len(tokens))).round().long()]
    hidden, calls = skeleton.embed(tokens)
    inputs = [hidden.clone()]
    for i in range(geometry.layers):
        with torch.no_grad(), skeleton.layer(i) as layer:
            for n in range(len(hidden)):
                hidden[n:n + 1] = _first(layer(hidden[n:n + 1], *calls[i].args, **calls[i].kwargs))
        inputs.append(hidden.clone())
        progress(i + 1, 2 * geometry.layers)
    gradient = _loss_gradient(skeleton, tokens, inputs.pop())
    moments: list[HeadMoments] = []
    for i in reversed(range(geometry.layers)):
        with skeleton.layer(i) as layer:
            moment, gradient = _backward(skeleton, layer, calls[i], inputs.pop(), gradient, geometry)
        moments.append(moment)
        progress(2 * geometry.layers - i, 2 * geometry.layers)
    return moments[::-1]


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _loss_gradient(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """d(-log p of tokens drawn from the model) / d(last hidden states), (n, T, D)."""
    generator, gradient = torch.Generator().manual_seed(SEED), torch.zeros_like(hidden)
    with skeleton.head() as head, torch.enable_grad():
        for n in range(len(tokens)):
            x = hidden[n:n + 1].requires_grad_(True)
            logits = head(tokens[n:n + 1].to(x.device), x)[0].float()                       # (T, vocabulary)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(x.device)
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            gradient[n:n + 1] = torch.autograd.grad(loss, x)[0]
    return gradient


def _backward(skeleton: Skeleton, layer, call, inputs: Tensor, gradient: Tensor, geometry: Geometry) -> tuple[HeadMoments, Tensor]:
    """Moments of one layer, and the gradient at its input."""
    H, d, adapter, seen = geometry.kv_heads, geometry.head_dim, skeleton.adapter, {}
    attention = layer.get_submodule(adapter.attention)
    hooks = [attention.get_submodule(adapter.key_projection).register_forward_hook(lambda m, args, output: seen.update(keys=output)),
             attention.get_submodule(adapter.output).register_forward_pre_hook(lambda m, args: seen.update(heads=args[0]))]
    keys, values = (torch.zeros(H, d, d, dtype=torch.float64, device=inputs.device) for _ in range(2))
    below = torch.empty_like(gradient)
    for n in range(len(inputs)):
        x = inputs[n:n + 1].requires_grad_(True)
        with torch.enable_grad():
            output = _first(layer(x, *call.args, **call.kwargs))
        below[n:n + 1], g_keys, g_heads = torch.autograd.grad(output, (x, seen["keys"], seen["heads"]), gradient[n:n + 1])
        g_keys = g_keys[0, :, adapter.key_columns(geometry)].view(-1, H, d).transpose(0, 1)     # (H, T, d)
        g_heads = g_heads[0].view(-1, H, geometry.groups, d).permute(1, 0, 2, 3).flatten(1, 2)  # (H, T G, d)
        keys += (g_keys.mT @ g_keys).double()
        values += (g_heads.mT @ g_heads).double()
    for hook in hooks:
        hook.remove()
    count = inputs.shape[0] * inputs.shape[1]
    return HeadMoments(keys / count, values / count), below
