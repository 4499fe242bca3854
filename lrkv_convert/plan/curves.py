"""Look at every layer before any rank is chosen: loss curves for the planner."""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch

from ..families import AttentionWeights, Geometry, Site
from ..fit.metric import LayerMetrics, Metric
from ..folder.store import Store
from ..forms import FORMS, group_count, of_values
from .allocate import Caps, Curve, Point
from .shapes import Plan

# From squared error to loss, measured on SmolLM2-135M (benchmarks/NOTES.md). The Fisher metric is
# the loss to second order; at the errors of a
# halved cache the loss grows faster, and errors of keys, which act together through the softmax,
# cost more than they would one by one. From
# (1.25, 4) to (1.5, 8) plans at 50 % differ by less than noise in domain; out of it the former are
# better by almost a per cent.
EXPONENT = 1.25
KEY_WEIGHT = 4.0
# of codes, whose errors are smaller and taken as they are
CODED_KEY_WEIGHT = 4.0


def width_caps(
    geometry: Geometry, keys: int | None, values: int | None, form: str = "joint"
) -> tuple[int, int]:
    """How wide the bases of keys, in this form, and of values may become: as asked, or as far as
    their forms go (`Form.cap`).
    """
    return (
        keys or FORMS[form].cap(geometry),
        values or FORMS["joint"].cap(of_values(geometry)),
    )


def survey(
    sites: Sequence[Site],
    look: Callable[[Site], tuple[AttentionWeights, LayerMetrics]],
    caps: Caps,
    keys: str,
    bits: Sequence[int] | None,
    group_size: int | None,
    store: Store,
    progress: Callable[[int], None] = lambda *_: None,
) -> list[tuple[Curve, Curve]]:
    """(keys, values) curves of every site; look: its weights and its metrics; keys: the name
    of their form; bits: widths of codes, None for 16-bit numbers; group_size: heads that share a
    base of codes, None for all. Finished ones are kept in the
    store, those of values whatever the form of keys.
    """
    curves, of_codes = [], "".join(f"-{width}" for width in bits or ())
    of_codes += "" if group_size is None else f"-in-{group_size}"
    for i, site in enumerate(sites):
        names = [f"curves-{side}{of_codes}-{site.name}" for side in (keys, "values")]
        if any(name not in store for name in names):
            seen, widest = look(site), caps(site.geometry)
            for name, of in zip(names, (_of_keys, _of_values)):
                if name not in store:
                    found = of(*seen, site.geometry, widest, keys, bits, group_size)
                    store.save(name, [astuple(point) for point in found])
        keys_curve, values_curve = ([Point(*p) for p in store.load(name)] for name in names)
        curves.append((keys_curve, values_curve))
        progress(i + 1)
    return curves


def _of_keys(
    weights: AttentionWeights,
    metrics: LayerMetrics,
    geometry: Geometry,
    caps: tuple[int, int],
    form: str,
    bits: Sequence[int] | None,
    group_size: int | None,
) -> Curve:
    """The curve of the keys of a site, in this form."""
    if bits is None:
        cap, b = caps[0], weights.b_K
        return curve(weights.W_K, metrics.keys, geometry, cap, KEY_WEIGHT, form, b)
    metric = metrics.side("keys", True)
    groups = group_count(geometry, group_size)
    return coded_curve(weights.W_K, metric, geometry, CODED_KEY_WEIGHT, form, bits, groups)


def _of_values(
    weights: AttentionWeights,
    metrics: LayerMetrics,
    geometry: Geometry,
    caps: tuple[int, int],
    form: str,
    bits: Sequence[int] | None,
    group_size: int | None,
) -> Curve:
    """The curve of its values, which is the same for any form of keys."""
    if bits is None:
        return curve(weights.W_V, metrics.values, geometry, caps[1], 1.0, bias=weights.b_V)
    metric = metrics.side("values", True)
    groups = group_count(geometry, group_size)
    return coded_curve(weights.W_V, metric, of_values(geometry), 1.0, "joint", bits, groups)


def curve(
    W: torch.Tensor,
    metric: Metric,
    geometry: Geometry,
    cap: int,
    weight: float,
    form: str = "joint",
    bias: torch.Tensor | None = None,
) -> Curve:
    """Predicted loss along one side's path of shapes: weight * (half the squared error in the
    Fisher metric) ** EXPONENT.
    """
    shapes = FORMS[form].candidates(geometry, cap)
    return [
        Point(
            shape.width,
            shape.rank,
            FORMS[form].numbers(shape, geometry),
            weight * (error / 2) ** EXPONENT,
        )
        for shape, error in zip(shapes, FORMS[form].curve(W, bias, metric, shapes))
    ]


def coded_curve(
    W: torch.Tensor,
    metric: Metric,
    geometry: Geometry,
    weight: float,
    form: str,
    bits: Sequence[int],
    groups: int = 1,
) -> Curve:
    """Predicted loss of latents as codes of these widths: weight * half the squared error."""
    return [
        Point(
            shape.width,
            shape.rank,
            FORMS[form].bytes(shape, geometry, 0),
            weight * error / 2,
            shape.codes[0] or shape.codes[1],
            groups,
        )
        for shape, error in FORMS[form].coded_curve(W, metric, bits, geometry, groups)
    ]


def second_order(loss: float, weight: float) -> float:
    """Half the squared error that `curve` made a loss of with this weight: what the Fisher metric
    itself predicts, in nats of KL.
    """
    return (loss / weight) ** (1 / EXPONENT)


def predicted_kl(curves: Sequence[tuple[Curve, Curve]], plan: Plan) -> float:
    """What the Fisher metric itself predicts of a plan made of these curves, in nats."""
    total = 0.0
    for (keys, values), planned in zip(curves, plan.sites, strict=True):
        for side, shape, weights in (
            (keys, planned.keys, (KEY_WEIGHT, CODED_KEY_WEIGHT)),
            (values, planned.values, (1.0, 1.0)),
        ):
            at = next(point for point in side if point.shape(shape.form) == shape)
            # the loss of codes is that of second order, weighed
            total += at.loss / weights[1] if at.codes else second_order(at.loss, weights[0])
    return total
