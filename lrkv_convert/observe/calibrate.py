"""Examples -> what the fit must know of each attention module, one layer at a time.

Memory holds one layer (source/skeleton.py), the hidden states of the examples and one layer's sums;
what the layers gave lies in a Store. Attention runs eagerly, because the metrics need its weights.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LrkvError, first_line
from ..examples.example import Example
from ..families import AttentionWeights, Site
from ..fit.codes import Spread
from ..fit.metric import HeadMoments, LayerMetrics
from ..folder.store import Store
from ..source.skeleton import Skeleton, first_of
from .sums import MetricSums, SpreadSums

AT_ONCE = 4  # windows given to the refit
# activations that wait on disk for the refit: they are the bulk of what a conversion stores
KEPT_AS = torch.bfloat16


@contextmanager
def solvable() -> Iterator[None]:
    """Raise LrkvError for a system of equations that has no solution: where numbers became too
    large to square.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  (public)
        raise LrkvError(
            f"the fit has no solution: {first_line(error)}",
            "are weights too large to be squared in float32? --calibration none fits them alone",
        ) from error


@dataclass(frozen=True)
class Observed:
    """One attention module as calibration saw it.

    weights: as stored in the checkpoint; rest: the other tensors of the module, norms and the like.
    With examples also the sums of its metrics (`MetricSums.state()`), and what it saw and did on
    each: inputs and heads, bfloat16, lists of (1, T, D) and (1, T, H G d) (the concatenated head
    outputs, which W_O reads); arguments: what else it is called with, by example; alike: whether
    that is the same for all; moments where gradients were taken; spread: how inputs lie.
    Without examples these are None or empty.
    """

    site: Site
    weights: AttentionWeights
    rest: dict[str, Tensor] = field(default_factory=dict)
    sums: dict | None = None
    inputs: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    arguments: Callable[[int], dict] = lambda n: {}
    alike: bool = True
    moments: HeadMoments | None = None
    spread: Spread | None = None

    def calls(self, device: torch.device) -> Iterator[tuple[Tensor, dict, Tensor]]:
        """What the module was called with and did, some examples at a time, float32: inputs
        (n, T, D), its other arguments, heads (n, T, H G d).
        """
        step = AT_ONCE if self.alike else 1
        for start in range(0, len(self.inputs), step):
            x, heads = (
                torch.cat(each[start : start + step]).to(device, torch.float32)
                for each in (self.inputs, self.heads)
            )
            yield x, self.arguments(start), heads

    def metrics(self, name: str) -> LayerMetrics:
        """The metrics called `name` (fit.metric.METRICS)."""
        return LayerMetrics(
            self.weights, self.site.geometry, name, self.sums, self.moments, self.spread
        )


class Watch:
    """What one attention module of a layer sees and does on every example."""

    def __init__(self, site: Site, skeleton: Skeleton, wanted: Collection[str], activations: bool):
        weights = site.adapter.split(skeleton.tensor, site.layer, skeleton.checkpoint.config)
        self.site, self.activations = site, activations
        self.sums = MetricSums(weights, site.geometry, wanted, skeleton.device)
        self.spread = SpreadSums(site.geometry, skeleton.device)
        self.inputs, self.heads, self.arguments = [], [], {}

    def hooks(self, layer: nn.Module) -> list[RemovableHandle]:
        attention = layer.get_submodule(self.site.adapter.attention)
        output = attention.get_submodule(self.site.adapter.output)
        return [
            attention.register_forward_hook(self._called, with_kwargs=True),
            output.register_forward_pre_hook(self._averaged),
        ]

    def _called(self, module, args, kwargs, output) -> None:
        self.arguments = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        states = kwargs.get("key_value_states")
        if self.activations:
            self.inputs.append(x.to(KEPT_AS))
        seen = x[0], output[-1][0], None if states is None else states[0]  # weights last
        self.sums.add(*seen)
        self.spread.add(*seen)

    def _averaged(self, module, args) -> None:
        if self.activations:
            self.heads.append(args[0].to(KEPT_AS))

    def state(self, whole: bool) -> dict:
        """For the store. whole: with what the module was called with."""
        found = {
            "sums": self.sums.state(),
            "spread": self.spread.state(),
            "inputs": self.inputs,
            "heads": self.heads,
        }
        return found | ({"arguments": self.arguments} if whole else {})


def encoder_states(
    skeleton: Skeleton, examples: Sequence[Example], store: Store
) -> Callable[[int], Tensor | None]:
    """The encoder's last hidden states (1, S, D) by example, worked out once; None without one."""
    if skeleton.family.encoder is None:
        return lambda n: None
    if "encoder" not in store:
        store.save("encoder", skeleton.encode(examples))
    found = store.load("encoder")
    return lambda n: found[n].to(skeleton.device)


@torch.no_grad()
def calibrate(
    skeleton: Skeleton,
    sites: Sequence[Site],
    examples: Sequence[Example],
    wanted: Collection[str],
    store: Store,
    keep: Sequence[int] = (),
    activations: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Run every decoder layer on all examples and save what `observed` reads, for the metrics
    called `wanted`.

    keep: indices of examples whose hidden states before each layer are saved too, as "entering-i",
    and after the last as "entering-L". activations: whether inputs and heads are saved, which only
    the refit reads.
    """
    layers = len(skeleton.layers)
    if f"entering-{layers}" in store:
        return
    states, begin = encoder_states(skeleton, examples, store), 0
    hidden, call = skeleton.embed(examples)
    if "forward" in store:
        state = store.load("forward")
        begin, hidden = state["next"], [h.clone().to(skeleton.device) for h in state["hidden"]]
    for i in range(begin, layers):
        here = [site for site in sites if site.layer == i]
        watches = {site.kind: Watch(site, skeleton, wanted, activations) for site in here}
        if keep:
            store.save(f"entering-{i}", [hidden[n] for n in keep])
        with skeleton.layer(i) as layer:
            hooks = [hook for watch in watches.values() for hook in watch.hooks(layer)]
            for n, h in enumerate(hidden):
                args, kwargs = call(i, h.shape[1], states(n))
                hidden[n] = first_of(layer(h, *args, **kwargs))
            for hook in hooks:
                hook.remove()
        if not all(torch.isfinite(h).all() for h in hidden):
            raise LrkvError(
                f"layer {i} gives NaN or Inf on the calibration text",
                "are its weights too large, or damaged? --calibration none fits them alone",
            )
        whole = skeleton.family.encoder is None
        store.save(f"layer-{i}", {kind: watch.state(whole) for kind, watch in watches.items()})
        store.save("forward", {"next": i + 1, "hidden": hidden})
        progress(i + 1, layers)
    store.save(f"entering-{layers}", [hidden[n] for n in keep])
    store.remove("forward")


def observed(skeleton: Skeleton, store: Store, site: Site) -> Observed:
    """One attention module as far as the store knows it: weights alone where there were no
    examples.
    """
    checkpoint, device = skeleton.checkpoint, skeleton.device
    there = lambda value: value.to(device) if isinstance(value, Tensor) else value
    weights = site.adapter.split(skeleton.tensor, site.layer, checkpoint.config).to(device)
    rest = {name: there(t) for name, t in site.adapter.rest(checkpoint, site.layer).items()}
    if f"layer-{site.layer}" not in store:
        return Observed(site, weights, rest)
    seen = store.load(f"layer-{site.layer}")[site.kind]
    taken = f"moments-{site.layer}" in store
    moments = store.load(f"moments-{site.layer}")[site.kind] if taken else None
    return Observed(
        site,
        weights,
        rest,
        {name: there(value) for name, value in seen["sums"].items()},
        seen["inputs"],
        seen["heads"],
        _arguments(skeleton, store, site, seen),
        skeleton.family.encoder is None,
        None if moments is None else HeadMoments(*map(there, moments)),
        Spread(**{name: there(value) for name, value in seen["spread"].items()}),
    )


def _arguments(skeleton: Skeleton, store: Store, site: Site, seen: dict) -> Callable[[int], dict]:
    """By example, what the module is called with beside its input."""
    device, inputs = skeleton.device, seen["inputs"]
    there = lambda value: value.to(device) if isinstance(value, Tensor) else value
    recorded = {
        name: tuple(map(there, value)) if isinstance(value, tuple) else there(value)
        for name, value in seen.get("arguments", {}).items()
    }
    longest = max((x.shape[1] for x in inputs), default=1)
    arguments = skeleton.attention_arguments(site.kind, recorded, longest)
    states = store.load("encoder") if site.kind == "cross" else None
    return lambda n: arguments(
        inputs[n].shape[1], None if states is None else states[n].to(device, torch.float32)
    )
