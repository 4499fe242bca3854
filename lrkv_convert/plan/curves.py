"""Look at every layer before any rank is chosen: loss curves for the planner."""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch

from ..families import AttentionWeights, Geometry, Site
from ..fit.bases import error_curve, rotary_error_curve
from ..fit.metric import LayerMetrics, Metric
from ..folder.store import Store
from .allocate import Caps, Curve, Point, candidates

# From squared error to loss, measured on SmolLM2-135M (benchmarks/NOTES.md). The Fisher metric is
# the loss to second order; at the errors of a
# halved cache the loss grows faster, and errors of keys, which act together through the softmax,
# cost more than they would one by one. From
# (1.25, 4) to (1.5, 8) plans at 50 % differ by less than noise in domain; out of it the former are
# better by almost a per cent.
EXPONENT = 1.25
KEY_WEIGHT = 4.0


def width_caps(geometry: Geometry, keys: int | None, values: int | None) -> tuple[int, int]:
    """How wide the bases of keys and values may become. A cached number of a RoPE key is read back
    at d flops per head (the key is rebuilt before it is rotated), that of a value or a
    position-free key at one: keys under RoPE or QK-norm stop at one head's width, the others at
    four.
    """
    d = geometry.head_dim
    return keys or (d if geometry.rebuilt else 4 * d), values or 4 * d


def survey(
    sites: Sequence[Site],
    look: Callable[[Site], tuple[AttentionWeights, LayerMetrics]],
    caps: Caps,
    keys: str,
    store: Store,
    progress: Callable[[int], None] = lambda *_: None,
) -> list[tuple[Curve, Curve]]:
    """(keys, values) curves of every site; look: its weights and its metrics; keys: their form
    (plan.shapes.KEYS). Finished ones are kept in the store.
    """
    curves = []
    for i, site in enumerate(sites):
        if (name := f"curves-{keys}-{site.name}") not in store:
            (weights, metrics), geometry = look(site), site.geometry
            widest = caps(geometry)
            sides = (
                curve(weights.W_K, metrics.keys, geometry, widest[0], KEY_WEIGHT, keys),
                curve(weights.W_V, metrics.values, geometry, widest[1], 1.0),
            )
            store.save(name, [[astuple(point) for point in side] for side in sides])
        keys_curve, values_curve = ([Point(*p) for p in side] for side in store.load(name))
        curves.append((keys_curve, values_curve))
        progress(i + 1)
    return curves


def curve(
    W: torch.Tensor,
    metric: Metric,
    geometry: Geometry,
    cap: int,
    weight: float,
    keys: str = "joint",
) -> Curve:
    """Predicted loss along one side's path of widths and ranks: weight * (half the squared error in
    the Fisher metric) ** EXPONENT.
    """
    shapes = candidates(geometry, cap, keys)
    errors = (
        [0.0]
        if keys == "full"
        else (
            rotary_error_curve(W, metric, shapes)
            if keys == "rotary"
            else error_curve(W, metric, shapes)
        )
    )
    return [
        Point(m, r, m + geometry.kv_heads * r, weight * (error / 2) ** EXPONENT)
        for (m, r), error in zip(shapes, errors)
    ]


def second_order(loss: float, weight: float) -> float:
    """Half the squared error that `curve` made a loss of with this weight: what the Fisher metric
    itself predicts, in nats of KL.
    """
    return (loss / weight) ** (1 / EXPONENT)
