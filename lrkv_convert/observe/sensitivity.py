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
(plan/allocate.py). Calibration keeps the hidden states of a few examples before each layer; the
layers are then run once more, last to first, with one layer's graph in memory at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..device import fast_bf16
from ..examples.example import Example, tokens_of
from ..families import Adapter, Site
from ..folder.store import Store
from ..source.skeleton import Call, Skeleton, first_of
from .calibrate import encoder_states

# gradients are taken on examples of so many tokens, or on one in SHARE of many: eight windows of
# 512; four were worse in domain (benchmarks/NOTES.md)
TOKENS, SHARE = 4096, 6
# model width from which gradients are taken in bfloat16, where the hardware multiplies it faster:
# moments of drawn tokens are far noisier
BF16_FROM = 256
SEED = 0  # of the tokens drawn from the model


def gradient_rows(examples: Sequence[Example]) -> list[int]:
    """Which of the examples gradients are taken on: their indices, spread evenly."""
    count, tokens = len(examples), tokens_of(examples)
    wanted = int(count * max(TOKENS, tokens / SHARE) / tokens)
    return torch.linspace(0, count - 1, max(1, min(wanted, count))).round().long().tolist()


def head_moments(
    skeleton: Skeleton,
    sites: Sequence[Site],
    examples: Sequence[Example],
    rows: Sequence[int],
    store: Store,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Save the moments of every attention module, "moments-i": {kind: (keys, values)}. rows: of the
    examples whose hidden states `calibrate` kept.
    """
    if "moments-0" in store:
        return
    layers, chosen = len(skeleton.layers), [examples[n] for n in rows]
    of_all = encoder_states(skeleton, examples, store)
    states = lambda n: of_all(rows[n])
    _, call = skeleton.embed(chosen)
    if "backward" in store:
        state = store.load("backward")
    else:
        last = store.load(f"entering-{layers}")
        state = {"next": layers - 1, "gradient": _loss_gradient(skeleton, last, states)}
    gradient = [g.clone().to(skeleton.device) for g in state["gradient"]]
    for i in range(state["next"], -1, -1):
        here = {site.kind: site for site in sites if site.layer == i}
        with skeleton.layer(i) as layer:
            entering = store.load(f"entering-{i}")
            moments = _backward(skeleton, layer, i, here, call, entering, states, gradient)
        store.save(f"moments-{i}", moments)
        store.save("backward", {"next": i - 1, "gradient": gradient})
        store.remove(f"entering-{i}")
        progress(layers - i, layers)
    store.remove("backward")


def _loss_gradient(
    skeleton: Skeleton, hidden: list[Tensor], states: Callable[[int], Tensor | None]
) -> list[Tensor]:
    """d(-log p of tokens drawn from the model) / d(last hidden states), (1, T, D) each."""
    generator, gradient = torch.Generator().manual_seed(SEED), []
    with skeleton.head() as head, torch.enable_grad():
        for n, h in enumerate(hidden):
            x = h.to(skeleton.device).clone().requires_grad_(True)
            with products(x):
                logits = head(x, states(n))
            gradient.append(drawn_gradient(logits, x, generator))
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
    skeleton: Skeleton,
    layer: nn.Module,
    i: int,
    sites: dict[str, Site],
    call: Call,
    entering: list[Tensor],
    states: Callable[[int], Tensor | None],
    gradient: list[Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments (H, d, d) of keys and values of each kind of attention of layer i; `gradient` becomes
    that at the layer's input.
    """
    seen, hooks, sums = {}, [], {}
    for kind, site in sites.items():
        hooks += _note(seen, kind, layer.get_submodule(site.adapter.attention), site.adapter)
        H, d = site.geometry.kv_heads, site.geometry.head_dim
        for side in ("keys", "values"):
            sums[kind, side] = torch.zeros(H, d, d, dtype=torch.float64, device=skeleton.device)
    for n, h in enumerate(entering):
        x, encoded = h.to(skeleton.device).clone().requires_grad_(True), states(n)
        if encoded is not None:  # cross-attention's keys are made of it
            encoded = encoded.detach().requires_grad_(True)
        args, kwargs = call(i, h.shape[1], encoded)
        with torch.enable_grad(), products(x):
            output = first_of(layer(x, *args, **kwargs))
        wanted = (x, *(seen[name] for name in sums))
        gradient[n], *found = torch.autograd.grad(output, wanted, gradient[n])
        for (kind, side), g in zip(sums, found):
            g = by_head(g[0].float(), sites[kind], side, skeleton.checkpoint.config)
            sums[kind, side] += (g.mT @ g).double()
    for hook in hooks:
        hook.remove()
    tokens = sum(h.shape[1] for h in entering)
    return {kind: (sums[kind, "keys"] / tokens, sums[kind, "values"] / tokens) for kind in sites}


def _note(seen: dict, kind: str, attention: nn.Module, adapter: Adapter) -> list:
    """Hooks that note what the key projection gives and what the output projection is handed."""

    def keys(module, args, output) -> None:
        seen[kind, "keys"] = output

    def values(module, args) -> None:
        seen[kind, "values"] = args[0]

    return [
        attention.get_submodule(adapter.key_projection).register_forward_hook(keys),
        attention.get_submodule(adapter.output).register_forward_pre_hook(values),
    ]


def by_head(gradient: Tensor, site: Site, side: str, config) -> Tensor:
    """Gradients (n, ...) at the key projection's output, or at the heads' outputs of the group ->
    (H, n, d) or (H, n G, d).
    """
    g = site.geometry
    if side == "keys":
        return site.adapter.keys(gradient, config).transpose(0, 1)
    grouped = gradient.view(-1, g.kv_heads, g.groups, g.head_dim)
    return grouped.permute(1, 0, 2, 3).flatten(1, 2)
