"""How much the loss minds an error in each head's keys and values: second moments of the gradient,
layer by layer.

For a small change of the logits, KL(original || changed) = 1/2 E (g . delta)^2, with g the gradient
of the log-probability of a token drawn from the model itself (the Fisher information). So the
metric of the heads (fit/metric.py) is, per token,

    keys     M_h = E g g^T      g: gradient at the key before rotation, which carries RoPE and the
             softmax exactly
    values   M_h = E g g^T      g: gradient at the head's output, summed over the group

in place of E q q^T and W_O W_O^T, which know nothing of what comes after the layer. Being in nats,
they also compare layers with each other, which is what spending a byte budget needs
(plan/allocate.py). Calibration keeps the hidden states of a few windows before each layer; the
layers are then run once more, last to first, with one layer's graph in memory at a time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..device import fast_bf16
from ..families import Geometry
from ..fit.metric import HeadMoments
from ..folder.store import Store
from ..source.skeleton import Skeleton, first_of

# of the calibration windows: 8, or one in 6 of many. 4 were worse in domain (benchmarks/NOTES.md)
WINDOWS, SHARE = 8, 6
# model width from which gradients are taken in bfloat16, where the hardware multiplies it faster:
# moments of drawn tokens are far noisier
BF16_FROM = 256
SEED = 0  # of the tokens drawn from the model


def gradient_rows(tokens: Tensor) -> Tensor:
    """Which of the calibration windows (n, T) gradients are taken on: their indices, spread
    evenly.
    """
    return (
        torch.linspace(0, len(tokens) - 1, min(max(WINDOWS, len(tokens) // SHARE), len(tokens)))
        .round()
        .long()
    )


def head_moments(
    skeleton: Skeleton,
    geometry: Geometry,
    tokens: Tensor,
    store: Store,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Save the moments of every layer, "moments-i". tokens (n, T): the windows whose hidden states
    `calibrate` kept.
    """
    if "moments-0" in store:
        return
    _, calls = skeleton.embed(tokens[:1])
    if "backward" in store:
        state = store.load("backward")
    else:
        state = {
            "next": geometry.layers - 1,
            "gradient": _loss_gradient(
                skeleton, store.load(f"entering-{geometry.layers}").to(skeleton.device)
            ),
        }
    gradient = state["gradient"].to(skeleton.device)
    for i in range(state["next"], -1, -1):
        entering = store.load(f"entering-{i}").to(skeleton.device)
        with skeleton.layer(i) as layer:
            moments, gradient = _backward(skeleton, layer, calls[i], entering, gradient, geometry)
        store.save(f"moments-{i}", (moments.keys, moments.values))
        store.save("backward", {"next": i - 1, "gradient": gradient})
        store.remove(f"entering-{i}")
        progress(geometry.layers - i, geometry.layers)
    store.remove("backward")


def _loss_gradient(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """d(-log p of tokens drawn from the model) / d(last hidden states), (n, T, D)."""
    generator, gradient = torch.Generator().manual_seed(SEED), torch.zeros_like(hidden)
    with skeleton.head() as head, torch.enable_grad():
        for n in range(len(hidden)):
            x = hidden[n : n + 1].clone().requires_grad_(True)
            with products(x):
                logits = head(x)
            gradient[n : n + 1] = drawn_gradient(logits, x, generator)
    return gradient


def products(x: Tensor) -> AbstractContextManager:
    """In what precision the model is run on x (..., D) for its gradients."""
    return (
        torch.autocast(x.device.type, torch.bfloat16)
        if x.shape[-1] >= BF16_FROM and fast_bf16(x.device)
        else nullcontext()
    )


def drawn_gradient(logits: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """d(-log p of tokens drawn from logits (1, T, vocabulary)) / d(hidden), which they were
    computed from.
    """
    # of the loss with the logits: p - 1 at the drawn token
    change = logits.detach()[0].float().softmax(-1)
    change.scatter_add_(
        1, drawn := draw(change, generator), torch.full_like(drawn, -1, dtype=change.dtype)
    )
    return torch.autograd.grad(logits, hidden, change.unsqueeze(0).to(logits.dtype))[0]


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index (T, 1) from each row of probabilities (T, n). For large n faster than
    torch.multinomial by far.
    """
    total = probabilities.cumsum(-1)  # (T, n)
    level = torch.rand(len(total), 1, generator=generator).to(total) * total[:, -1:]
    return torch.searchsorted(total, level).clamp_max(total.shape[1] - 1)


def _backward(
    skeleton: Skeleton, layer, call, inputs: Tensor, gradient: Tensor, geometry: Geometry
) -> tuple[HeadMoments, Tensor]:
    """Moments of one layer, and the gradient at its input."""
    H, d, adapter, seen = geometry.kv_heads, geometry.head_dim, skeleton.adapter, {}
    attention = layer.get_submodule(adapter.attention)
    hooks = [
        attention.get_submodule(adapter.key_projection).register_forward_hook(
            lambda m, args, output: seen.update(keys=output)
        ),
        attention.get_submodule(adapter.output).register_forward_pre_hook(
            lambda m, args: seen.update(heads=args[0])
        ),
    ]
    keys, values = (
        torch.zeros(H, d, d, dtype=torch.float64, device=inputs.device) for _ in range(2)
    )
    below = torch.empty_like(gradient)
    for n in range(len(inputs)):
        x = inputs[n : n + 1].clone().requires_grad_(True)
        with torch.enable_grad(), products(x):
            output = first_of(layer(x, *call.args, **call.kwargs))
        below[n : n + 1], g_keys, g_heads = torch.autograd.grad(
            output, (x, seen["keys"], seen["heads"]), gradient[n : n + 1]
        )
        # (H, T, d)
        g_keys = adapter.keys(g_keys[0].float(), skeleton.checkpoint.config).transpose(0, 1)
        # (H, T G, d)
        g_heads = (
            g_heads[0].float().view(-1, H, geometry.groups, d).permute(1, 0, 2, 3).flatten(1, 2)
        )
        keys += (g_keys.mT @ g_keys).double()
        values += (g_heads.mT @ g_heads).double()
    for hook in hooks:
        hook.remove()
    count = inputs.shape[0] * inputs.shape[1]
    return HeadMoments(keys / count, values / count), below
