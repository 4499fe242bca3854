"""Look at every layer before any rank is chosen: loss curves for the planner."""

from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch

from ..families import AttentionWeights, Geometry, Site
from ..fit.metric import LayerMetrics, Metric
from ..folder.store import Store
from ..forms import FORMS, of_values
from ..modeling.codes_lrkv import row_bytes
from .allocate import Caps, Curve, Point

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
    store: Store,
    progress: Callable[[int], None] = lambda *_: None,
) -> list[tuple[Curve, Curve]]:
    """(keys, values) curves of every site; look: its weights and its metrics; keys: the name
    of their form; bits: widths of codes, None for 16-bit numbers. Finished ones are kept in the
    store.
    """
    curves = []
    for i, site in enumerate(sites):
        of_codes = "".join(f"-{width}" for width in bits or ())
        if (name := f"curves-{keys}{of_codes}-{site.name}") not in store:
            (weights, metrics), geometry = look(site), site.geometry
            widest = caps(geometry)
            if bits is None:
                sides = (
                    curve(
                        weights.W_K,
                        metrics.keys,
                        geometry,
                        widest[0],
                        KEY_WEIGHT,
                        keys,
                        weights.b_K,
                    ),
                    curve(weights.W_V, metrics.values, geometry, widest[1], 1.0, bias=weights.b_V),
                )
            else:
                sides = (
                    coded_curve(
                        weights.W_K, metrics.side("keys", True), CODED_KEY_WEIGHT, keys, bits
                    ),
                    coded_curve(weights.W_V, metrics.side("values", True), 1.0, "joint", bits),
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
    W: torch.Tensor, metric: Metric, weight: float, form: str, bits: Sequence[int]
) -> Curve:
    """Predicted loss of latents as codes of these widths: weight * half the squared error."""
    return [
        Point(shape.width, shape.rank, row_bytes(blocks), weight * error / 2, blocks)
        for shape, error in FORMS[form].coded_curve(W, metric, bits)
        if (blocks := shape.codes[0]) is not None
    ]


def second_order(loss: float, weight: float) -> float:
    """Half the squared error that `curve` made a loss of with this weight: what the Fisher metric
    itself predicts, in nats of KL.
    """
    return (loss / weight) ** (1 / EXPONENT)
