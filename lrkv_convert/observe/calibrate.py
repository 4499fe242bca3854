"""Text -> what the fit must know of each layer, one layer at a time.

Memory holds one layer (source/skeleton.py), the hidden states of the calibration windows and one
layer's sums; what the layers gave lies in a Store. Attention runs eagerly, because the metrics need
its weights.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LrkvError, first_line
from ..families import AttentionWeights, Geometry
from ..fit.metric import HeadMoments, LayerMetrics
from ..folder.store import Store
from ..source.skeleton import Skeleton, first_of
from .sums import MetricSums

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
    except torch.linalg.LinAlgError as error:
        raise LrkvError(
            f"the fit has no solution: {first_line(error)}",
            "are weights too large to be squared in float32? --calibration none fits them alone",
        ) from error


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer as calibration saw it.

    weights: as stored in the checkpoint; rest: the other tensors of its attention module, norms and
    the like. With calibration text also the sums of its metrics (`MetricSums.state()`), and what
    its attention module saw and did on each window: inputs and heads, bfloat16, lists of (1, T, D)
    and (1, T, H G d) (the concatenated head outputs, which W_O reads), and the other arguments it
    was called with; moments where gradients were taken. Without text these are None or empty.
    """

    index: int
    weights: AttentionWeights
    rest: dict[str, Tensor] = field(default_factory=dict)
    sums: dict | None = None
    inputs: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)
    moments: HeadMoments | None = None

    def calls(self, device: torch.device) -> Iterator[tuple[Tensor, dict, Tensor]]:
        """What the attention module was called with and did, some windows at a time, float32:
        inputs (n, T, D), its other arguments, heads (n, T, H G d).
        """
        for start in range(0, len(self.inputs), AT_ONCE):
            x, heads = (
                torch.cat(windows[start : start + AT_ONCE]).to(device, torch.float32)
                for windows in (self.inputs, self.heads)
            )
            yield x, self.arguments, heads

    def metrics(self, geometry: Geometry, name: str) -> LayerMetrics:
        """The metrics called `name` (fit.metric.METRICS)."""
        return LayerMetrics(self.weights, geometry, name, self.sums, self.moments)


@torch.no_grad()
def calibrate(
    skeleton: Skeleton,
    geometry: Geometry,
    tokens: Tensor,
    wanted: Collection[str],
    store: Store,
    keep: Tensor | None = None,
    activations: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Run every layer on all windows (n, T) and save what `calibrated_layer` reads, for the metrics
    called `wanted`.

    keep: indices of windows whose hidden states before each layer are saved too, as "entering-i",
    and after the last as "entering-L". activations: whether inputs and heads are saved, which only
    the refit reads.
    """
    if f"entering-{geometry.layers}" in store:
        return
    checkpoint, adapter, device = skeleton.checkpoint, skeleton.adapter, skeleton.device
    hidden, calls = skeleton.embed(tokens)
    begin = 0
    if "forward" in store:
        state = store.load("forward")
        begin, hidden = state["next"], state.pop("hidden").clone().to(device)
    for i in range(begin, geometry.layers):
        sums, inputs, heads, arguments = (
            MetricSums(
                adapter.split(checkpoint.tensor, i, checkpoint.config), geometry, wanted, device
            ),
            [],
            [],
            {},
        )
        entering = None if keep is None else hidden[keep]

        def see(module, args, kwargs, output):
            arguments.update(kwargs)
            x = arguments.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if activations:
                inputs.append(x.to(KEPT_AS))
            sums.add(x[0], output[1][0])

        with skeleton.layer(i) as layer:
            attention = layer.get_submodule(adapter.attention)
            hooks = [
                attention.register_forward_hook(see, with_kwargs=True),
                attention.get_submodule(adapter.output).register_forward_pre_hook(
                    lambda module, args: heads.append(args[0].to(KEPT_AS)) if activations else None
                ),
            ]
            for n in range(len(hidden)):
                hidden[n : n + 1] = first_of(
                    layer(hidden[n : n + 1], *calls[i].args, **calls[i].kwargs)
                )
            for hook in hooks:
                hook.remove()
        if not torch.isfinite(hidden).all():
            raise LrkvError(
                f"layer {i} gives NaN or Inf on the calibration text",
                "are its weights too large, or damaged? --calibration none fits them alone",
            )
        if entering is not None:
            store.save(f"entering-{i}", entering)
        store.save(
            f"layer-{i}",
            {"sums": sums.state(), "inputs": inputs, "heads": heads, "arguments": arguments},
        )
        store.save("forward", {"next": i + 1, "hidden": hidden})
        progress(i + 1, geometry.layers)
    store.save(f"entering-{geometry.layers}", hidden[:0] if keep is None else hidden[keep])
    store.remove("forward")


def calibrated_layer(skeleton: Skeleton, store: Store, i: int) -> CalibratedLayer:
    """Layer i as far as the store knows it: weights alone where there was no text."""
    checkpoint, device = skeleton.checkpoint, skeleton.device
    there = lambda value: value.to(device) if isinstance(value, Tensor) else value
    weights = skeleton.adapter.split(checkpoint.tensor, i, checkpoint.config).to(device)
    rest = {name: there(tensor) for name, tensor in skeleton.adapter.rest(checkpoint, i).items()}
    if f"layer-{i}" not in store:
        return CalibratedLayer(i, weights, rest)
    seen = store.load(f"layer-{i}")
    moments = (
        HeadMoments(*map(there, store.load(f"moments-{i}"))) if f"moments-{i}" in store else None
    )
    arguments = {
        name: tuple(map(there, value)) if isinstance(value, tuple) else there(value)
        for name, value in seen["arguments"].items()
    }
    return CalibratedLayer(
        i,
        weights,
        rest,
        {name: there(value) for name, value in seen["sums"].items()},
        seen["inputs"],
        seen["heads"],
        arguments,
        moments,
    )
