"""Look at every layer before any rank is chosen: loss curves for the planner, the calibration itself kept on disk for the fit that follows."""
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .adapters import Geometry
from .allocate import Curve, Point, candidates
from .calibrate import CalibratedLayer
from .errors import LrkvError
from .factorise import error_curve
from .metrics import LayerMetrics, Metric

# From squared error to loss, measured on SmolLM2-135M (all layers' keys, or all values, truncated at eight shapes in all; benchmarks/NOTES.md). The Fisher
# metric is the loss to second order; at the errors of a halved cache the loss grows faster, as the 1.5th to 1.8th power, and errors of keys, which
# act together through the softmax, cost about eight times what they would one by one. Before the refit, plans
# at 50 % gave x1.121 with 1 and 1, x1.079 with 1.3 and 8, x1.080 with 1.6 and 8.
EXPONENT = 1.5
KEY_WEIGHT = 8.0


def width_caps(geometry: Geometry, keys: int | None, values: int | None) -> tuple[int, int]:
    """How wide the bases of keys and values may become. A cached number of a RoPE key is read back at d flops per head (the key is rebuilt before
    it is rotated), that of a value or a position-free key at one: keys under RoPE stop at one head's width, the others at four."""
    d = geometry.head_dim
    return keys or (d if geometry.rotary else 4 * d), values or 4 * d


def survey(layers: Iterator[CalibratedLayer], measure: Callable[[CalibratedLayer], LayerMetrics], geometry: Geometry, caps: tuple[int, int],
           spill: Path, progress: Callable[[int], None] = lambda *_: None) -> tuple[list[tuple[Curve, Curve]], Iterator[CalibratedLayer]]:
    """(keys, values) curves of every layer, and the layers again, read back from `spill` one at a time. Raises LrkvError if it is full."""
    curves = []
    for layer in layers:
        metrics = measure(layer)
        curves.append((curve(layer.weights.W_K, metrics.keys, geometry, caps[0], KEY_WEIGHT),
                       curve(layer.weights.W_V, metrics.values, geometry, caps[1], 1.0)))
        try:
            torch.save(layer, spill / f"{layer.index}.pt")
        except (OSError, RuntimeError) as error:
            raise LrkvError(f"cannot keep the calibration in {spill}: {error}", "set TMPDIR to a disk with more room, or give fewer --calibration-tokens") from error
        progress(layer.index + 1)
    return curves, (torch.load(spill / f"{i}.pt", weights_only=False) for i in range(len(curves)))     # our own file, written a moment ago


def curve(W: torch.Tensor, metric: Metric, geometry: Geometry, cap: int, weight: float) -> Curve:
    """Predicted loss along one side's path of widths and ranks: weight * (half the squared error in the Fisher metric) ** EXPONENT."""
    shapes = candidates(geometry, cap)
    return [Point(m, r, m + geometry.kv_heads * r, weight * (error / 2) ** EXPONENT) for (m, r), error in zip(shapes, error_curve(W, metric, shapes))]
