"""Examples -> what the fit must know of each decoder layer, one layer at a time: as
observe/calibrate.py and observe/sensitivity.py, of two kinds of attention.

In cross-attention T decoder tokens attend to S encoder positions x_s. What changes:

    keys     Sigma_K = sum_s w_s x_s x_s^T      w_s: attention mass that encoder position s receives
             from all decoder tokens and heads
             M_h     = sum_s g_s g_s^T          g_s: gradient at its key
    values   Sigma_V = sum_t z_t z_t^T          z_t = sum_s a_ts x_s, for every head
             M_h     = sum_t g_t g_t^T          g_t: gradient at the head's output

All are means per decoder token, which is what the loss is a mean over, so that errors of keys and
values, and of layers, compare.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..families import Adapter, AttentionWeights, Geometry
from ..fit.metric import HeadMoments
from ..folder.store import Store
from ..observe.calibrate import KEPT_AS, CalibratedLayer
from ..observe.sensitivity import SEED, SHARE, drawn_gradient
from ..observe.sums import MetricSums
from ..source.skeleton import first_of
from .skeleton import StackSkeleton

# targets of so many tokens, or one in SHARE of more, have the gradient of the loss taken on them
GRADIENT_TOKENS = 4096

Progress = Callable[[int, int], None]


class CrossSums(MetricSums):
    """The second moments of cross-attention. inputs: sum x x^T over encoder positions, per decoder
    token as the others.
    """

    def add(self, x: Tensor, attention: Tensor, states: Tensor) -> None:
        """x (T, D): input of the attention module; attention (H, T, S): its weights; states (S, D):
        what it attends to.
        """
        self.tokens += x.shape[0]
        if self.inputs is not None:
            self.inputs += states.T @ states * (x.shape[0] / states.shape[0])  # (D, D)
        if self.keys is not None:
            self.keys += states.T @ (attention.sum((0, 1)).unsqueeze(1) * states)  # (D, D)
            # (D, D): sum_h Z_h^T Z_h, Z_h = A_h X
            self.values += states.T @ (self.add_heads(states, attention, gram) @ states)
        self.add_queries(x)


def gram(attention: Tensor) -> Tensor:
    """sum_h A_h^T A_h (S, S) of attention weights (heads, T, S)."""
    every = attention.flatten(0, 1)
    return every.T @ every


def adapters_of(skeleton: StackSkeleton, kinds: Collection[str]) -> dict[str, Adapter]:
    """The adapters of the kinds of attention that are converted."""
    return {kind: skeleton.family.kinds[kind] for kind in kinds}


@torch.no_grad()
def calibrate(
    skeleton: StackSkeleton,
    kinds: Collection[str],
    sources: list[Tensor],
    targets: list[Tensor],
    wanted: Collection[str],
    store: Store,
    keep: Sequence[int] = (),
    activations: bool = True,
    progress: Progress = lambda *_: None,
) -> None:
    """Run every decoder layer on all examples and save what `calibrated_layer` reads, for the
    metrics called `wanted`.

    sources: as the encoder takes them; targets: ids (T,) that the decoder reads; keep: indices of
    examples whose hidden states before each layer are saved too, as "entering-i", and after the
    last as "entering-L"; activations: whether inputs and heads are saved, which only the refit
    reads.
    """
    adapters, config = adapters_of(skeleton, kinds), skeleton.checkpoint.config
    layers = skeleton.family.any.geometry(config).layers
    if f"entering-{layers}" in store:
        return
    if "encoder" not in store:
        store.save("encoder", skeleton.encode(sources))
    states, begin = store.load("encoder"), 0
    if "forward" in store:
        state = store.load("forward")
        begin, hidden = state["next"], [h.clone().to(skeleton.device) for h in state["hidden"]]
    else:
        hidden = skeleton.embed(targets)
    more = skeleton.hands_on(skeleton.family.decoder, max(map(len, targets)))
    for i in range(begin, layers):
        seen = {
            kind: Seen(
                _sums(
                    kind,
                    adapter.split(skeleton.tensor, i, config),
                    adapter.geometry(config),
                    wanted,
                    skeleton.device,
                ),
                activations,
            )
            for kind, adapter in adapters.items()
        }
        if keep:
            store.save(f"entering-{i}", [hidden[n] for n in keep])
        with skeleton.layer(skeleton.family.decoder, i) as layer:
            hooks = [
                hook
                for kind, adapter in adapters.items()
                for hook in seen[kind].watch(layer, adapter)
            ]
            for n, h in enumerate(hidden):
                T = h.shape[1]
                hidden[n] = first_of(
                    layer(
                        h,
                        attention_mask=skeleton.causal_mask(T),
                        encoder_hidden_states=states[n].to(skeleton.device),
                        **more(T),
                    )
                )
            for hook in hooks:
                hook.remove()
        store.save(
            f"layer-{i}",
            {
                kind: {"sums": each.sums.state(), "inputs": each.inputs, "heads": each.heads}
                for kind, each in seen.items()
            },
        )
        store.save("forward", {"next": i + 1, "hidden": hidden})
        progress(i + 1, layers)
    store.save(f"entering-{layers}", [hidden[n] for n in keep])
    store.remove("forward")


def _sums(kind: str, *arguments) -> MetricSums:
    return (CrossSums if kind == "cross" else MetricSums)(*arguments)


class Seen:
    """What one attention module of a layer saw and did on every example."""

    def __init__(self, sums: MetricSums, activations: bool):
        self.sums, self.activations, self.inputs, self.heads = sums, activations, [], []

    def watch(self, layer: torch.nn.Module, adapter: Adapter) -> list:
        """Hooks that note it."""
        attention = layer.get_submodule(adapter.attention)
        return [
            attention.register_forward_hook(self._called, with_kwargs=True),
            attention.get_submodule(adapter.output).register_forward_pre_hook(self._output),
        ]

    def _called(self, module, args, kwargs, output) -> None:
        x, states = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            kwargs.get("key_value_states"),
        )
        if self.activations:
            self.inputs.append(x.to(KEPT_AS))
        # weights come last
        self.sums.add(x[0], output[-1][0], *([] if states is None else [states[0]]))

    def _output(self, module, args) -> None:
        if self.activations:
            self.heads.append(args[0].to(KEPT_AS))


@dataclass(frozen=True)
class CalibratedAttention(CalibratedLayer):
    """One kind of attention of one layer, as calibration saw it: examples are of different lengths.
    states: what cross-attention attends to, one (1, S, D) per example; handed: by length, the other
    arguments of self-attention.
    """

    states: list[Tensor] = field(default_factory=list)
    handed: Callable[[int], dict] = lambda length: {}

    def calls(self, device: torch.device) -> Iterator[tuple[Tensor, dict, Tensor]]:
        for n, (x, heads) in enumerate(zip(self.inputs, self.heads)):
            arguments = (
                {"key_value_states": self.states[n].to(device, torch.float32)}
                if self.states
                else self.handed(x.shape[1])
            )
            yield x.to(device, torch.float32), arguments, heads.to(device, torch.float32)


def calibrated_layer(
    skeleton: StackSkeleton, kind: str, store: Store, i: int
) -> CalibratedAttention:
    """One kind of attention of layer i as far as the store knows it: weights alone where there were
    no examples.
    """
    there = lambda value: value.to(skeleton.device) if isinstance(value, Tensor) else value
    weights: AttentionWeights = (
        skeleton.family.kinds[kind]
        .split(skeleton.tensor, i, skeleton.checkpoint.config)
        .to(skeleton.device)
    )
    rest = {
        name: there(tensor)
        for name, tensor in skeleton.family.kinds[kind].rest(skeleton.checkpoint, i).items()
    }
    if f"layer-{i}" not in store:
        return CalibratedAttention(i, weights, rest)
    seen = store.load(f"layer-{i}")[kind]
    moments = (
        HeadMoments(*map(there, store.load(f"moments-{i}")[kind]))
        if f"moments-{i}" in store
        else None
    )
    return CalibratedAttention(
        i,
        weights,
        rest,
        {name: there(value) for name, value in seen["sums"].items()},
        seen["inputs"],
        seen["heads"],
        moments=moments,
        states=store.load("encoder") if kind == "cross" else [],
        handed=self_arguments(skeleton, seen["inputs"]),
    )


def self_arguments(skeleton: StackSkeleton, inputs: list[Tensor]) -> Callable[[int], dict]:
    """By length, what self-attention is called with beside its input."""
    more = skeleton.hands_on(skeleton.family.decoder, max((x.shape[1] for x in inputs), default=1))
    return lambda length: {skeleton.family.mask: skeleton.causal_mask(length), **more(length)}


def gradient_rows(targets: list[Tensor]) -> list[int]:
    """Which of the examples gradients are taken on, spread evenly."""
    tokens = sum(map(len, targets))
    count = max(1, round(len(targets) * min(1, max(GRADIENT_TOKENS, tokens / SHARE) / tokens)))
    return torch.linspace(0, len(targets) - 1, count).round().long().tolist()


def head_moments(
    skeleton: StackSkeleton,
    kinds: Collection[str],
    rows: list[int],
    store: Store,
    progress: Progress = lambda *_: None,
) -> None:
    """Save the moments of every layer, "moments-i": {kind: (keys, values)}. rows: the examples
    whose hidden states `calibrate` kept.
    """
    if "moments-0" in store:
        return
    adapters, layers = (
        adapters_of(skeleton, kinds),
        skeleton.family.any.geometry(skeleton.checkpoint.config).layers,
    )
    every = store.load("encoder")
    states = [every[n] for n in rows]
    last = store.load(f"entering-{layers}")
    more = skeleton.hands_on(skeleton.family.decoder, max(h.shape[1] for h in last))
    state = (
        store.load("backward")
        if "backward" in store
        else {"next": layers - 1, "gradient": _loss_gradient(skeleton, last, states)}
    )
    gradient = [g.clone().to(skeleton.device) for g in state["gradient"]]
    for i in range(state["next"], -1, -1):
        with skeleton.layer(skeleton.family.decoder, i) as layer:
            moments = _backward(
                skeleton, layer, adapters, store.load(f"entering-{i}"), states, gradient, more
            )
        store.save(f"moments-{i}", moments)
        store.save("backward", {"next": i - 1, "gradient": gradient})
        store.remove(f"entering-{i}")
        progress(layers - i, layers)
    store.remove("backward")


def _loss_gradient(
    skeleton: StackSkeleton, hidden: list[Tensor], states: list[Tensor]
) -> list[Tensor]:
    """d(-log p of tokens drawn from the model) / d(last hidden states), (1, T, D) each."""
    generator, gradient = torch.Generator().manual_seed(SEED), []
    with skeleton.head() as head, torch.enable_grad():
        for h, encoded in zip(hidden, states):
            x = h.to(skeleton.device).clone().requires_grad_(True)
            gradient.append(drawn_gradient(head(x, encoded.to(skeleton.device)), x, generator))
    return gradient


def _backward(
    skeleton: StackSkeleton,
    layer,
    adapters: dict[str, Adapter],
    entering: list[Tensor],
    states: list[Tensor],
    gradient: list[Tensor],
    more: Callable[[int], dict],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of the kinds of attention of one layer; `gradient` becomes that at the layer's
    input.
    """
    seen, hooks = {}, []
    for kind, adapter in adapters.items():
        attention = layer.get_submodule(adapter.attention)
        hooks += [
            attention.get_submodule(adapter.key_projection).register_forward_hook(
                partial(_note_output, seen, f"{kind} keys")
            ),
            attention.get_submodule(adapter.output).register_forward_pre_hook(
                partial(_note_input, seen, f"{kind} values")
            ),
        ]
    shapes = {
        kind: adapter.geometry(skeleton.checkpoint.config) for kind, adapter in adapters.items()
    }
    sums = {
        f"{kind} {side}": torch.zeros(
            g.kv_heads, g.head_dim, g.head_dim, dtype=torch.float64, device=skeleton.device
        )
        for kind, g in shapes.items()
        for side in ("keys", "values")
    }
    for n, (h, encoded) in enumerate(zip(entering, states)):
        x, T = h.to(skeleton.device).clone().requires_grad_(True), h.shape[1]
        with torch.enable_grad():
            output = first_of(
                layer(
                    x,
                    attention_mask=skeleton.causal_mask(T),
                    encoder_hidden_states=encoded.to(skeleton.device).detach().requires_grad_(True),
                    **more(T),
                )
            )
        gradient[n], *found = torch.autograd.grad(
            output, (x, *(seen[name] for name in sums)), gradient[n]
        )
        for name, g in zip(sums, found):
            sums[name] += _moments(g[0], shapes[name.split()[0]])
    for hook in hooks:
        hook.remove()
    tokens = sum(h.shape[1] for h in entering)
    return {
        kind: (sums[f"{kind} keys"] / tokens, sums[f"{kind} values"] / tokens) for kind in adapters
    }


def _note_output(seen: dict, name: str, module, args, output) -> None:
    seen[name] = output


def _note_input(seen: dict, name: str, module, args) -> None:
    seen[name] = args[0]


def _moments(gradient: Tensor, g: Geometry) -> Tensor:
    """(n, H d) -> sum over n of g_h g_h^T, (H, d, d) float64."""
    # (H, n, d)
    each = gradient.view(-1, g.kv_heads, g.head_dim).transpose(0, 1)
    return (each.mT @ each).double()
