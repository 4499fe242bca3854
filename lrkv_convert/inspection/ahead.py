"""Before a conversion: what every rank would cost, streamed layer by layer as a conversion is.

What a rank would cost is predicted as KL(original || converted) in nats per token: half the squared
error of the fit in the Fisher metric, summed over layers, keys and values. Measured on other text
of the calibration's kind (benchmarks/NOTES.md), the divergence was 1.3 to 1.6 times that at uniform
ranks and 1.9 to 2.3 times in plans on SmolLM2-135M, 1.1 and 1.0 times on a 6M model: an estimate,
on the low side. It is no prediction of perplexity. Where a model reads well the loss rises by about
as much (SmolLM2, uniform: 0.9 to 1.2 times the prediction; plans: 1.2 to 1.9 times); where it reads
badly, to read differently is not to read worse (the 6M model at half its cache: predicted 0.33
nats, diverged 0.36, lost 0.06).
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..conversion import gather_texts, observe, open_model, survey_layer
from ..device import pick_device
from ..errors import LrkvError
from ..examples.text import Text, check_ids, window_length, windows
from ..families import Geometry
from ..folder.store import Store
from ..observe.calibrate import solvable
from ..plan.allocate import Curve, allocate
from ..plan.curves import KEY_WEIGHT, curve, second_order, width_caps
from ..plan.shapes import LayerPlan, Plan
from ..source.skeleton import Skeleton
from .ablate import ablate
from .diversity import mean_diversity
from .spectra import LayerLook, Spectrum, look
from .text import text_windows

# a quarter of a conversion's: which rank costs what is settled long before the factors are
CALIBRATION_TOKENS = 8192
ABLATION_TOKENS = 1024
# nats per token: five per cent of perplexity on text that the model reads well
TARGET_KL = 0.05
# cache ratios that are tried for the recommendation
RATIOS = [n / 100 for n in range(10, 100, 5)]
SHARES = (0.9, 0.99)  # of a head's energy: how many dimensions hold them
Progress = Callable[[str, int, int], None]


@solvable()
def ahead(
    model: str,
    ranks: list[int] | None,
    target_kl: float,
    calibration: list[str] | None,
    calibration_tokens: int | None,
    text: Text | None,
    max_tokens: int | None,
    device: str,
    progress: Progress,
) -> dict:
    """What a conversion of `model` would cost; with a text, also what its heads are worth.
    Arguments are those of `inspect`.
    """
    wanted = calibration_tokens or CALIBRATION_TOKENS
    checkpoint, adapter = open_model(model)
    geometry = adapter.geometry(checkpoint.config)
    ranks = checked_ranks(ranks, geometry)
    skeleton = Skeleton(checkpoint, adapter, pick_device(device))
    read = text_windows(text, checkpoint, max_tokens or ABLATION_TOKENS) if text else None
    texts = gather_texts(calibration, wanted, model, skeleton)
    if not texts:
        raise LrkvError(
            "without calibration text there is no gradient to predict a loss from",
            "give --calibration, or leave it out",
        )
    tokens = windows(texts, checkpoint.tokenizer(), window_length(checkpoint.config), wanted)
    check_ids(tokens, checkpoint.config.vocab_size, model)
    for done, total in checkpoint.finite(skeleton.expected()):
        progress("checking", done, total)
    with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
        store = Store(Path(folder), {})
        observe(skeleton, geometry, tokens, "fisher", store, progress, for_refit=False)
        layers, curves = look_at_layers(skeleton, geometry, ranks, store, progress)
    planned = partial(planned_kl, curves, geometry)
    result = {
        "model": model,
        "kind": "original",
        "geometry": asdict(geometry),
        "metric": "fisher",
        "calibration": {
            "texts": [{"name": t.name, "sha256": t.sha256} for t in texts],
            "tokens": tokens.numel(),
        },
        "ranks": [rank_row(layers, geometry, rank, planned) for rank in ranks],
        "recommended": recommended(layers, geometry, ranks, planned, target_kl),
        "diversity": mean_diversity([layer.gram for layer in layers]),
        "layers": [
            layer_row(i, layer, ranks, target_kl / geometry.layers / 2, geometry)
            for i, layer in enumerate(layers)
        ],
    }
    if read is not None:
        result["ablation"] = {
            "text": {"name": text.name, "sha256": text.sha256},
            **ablate(
                skeleton,
                geometry,
                layers,
                read,
                lambda done, total: progress("ablating", done, total),
            ),
        }
    return result


def look_at_layers(
    skeleton: Skeleton, geometry: Geometry, ranks: list[int], store: Store, progress: Progress
) -> tuple[list[LayerLook], list[tuple[Curve, Curve]]]:
    """The look at every layer, and its (keys, values) curves for the planner."""
    layers, curves, (cap_keys, cap_values) = [], [], width_caps(geometry, None, None)
    for i in range(geometry.layers):
        weights, metrics = survey_layer(skeleton, geometry, "fisher", store, i)
        layers.append(look(weights, metrics, ranks))
        curves.append(
            (
                curve(weights.W_K, metrics.keys, geometry, cap_keys, KEY_WEIGHT),
                curve(weights.W_V, metrics.values, geometry, cap_values, 1.0),
            )
        )
        progress("looking", i + 1, geometry.layers)
    return layers, curves


def checked_ranks(ranks: list[int] | None, geometry: Geometry) -> list[int]:
    """Ascending; by default about eight from 0 to below break-even, in steps of a multiple of 4
    where heads are wide. Raises LrkvError.
    """
    H, d = geometry.kv_heads, geometry.head_dim
    if ranks is None:
        step = max(d // 8 // 4 * 4, 1) if d >= 32 else max(d // 8, 1)
        return [rank for rank in range(0, d, step) if d + H * rank < H * d]
    if bad := [rank for rank in ranks if not 0 <= rank <= d]:
        raise LrkvError(
            f"rank {bad[0]} is out of range", f"a rank lies between 0 and the head width, {d}"
        )
    return sorted(set(ranks))


def uniform(geometry: Geometry, rank: int) -> Plan:
    """What `convert --rank` plans: every layer's keys and values alike, with a base as wide as a
    head.
    """
    d = geometry.head_dim
    return Plan(geometry, (LayerPlan(d, rank, d, rank),) * geometry.layers, 1)


def planned_kl(curves: list[tuple[Curve, Curve]], geometry: Geometry, ratio: float) -> float | None:
    """Predicted KL of what `convert --cache-ratio` plans, in nats; None below its floor."""
    try:
        plan = allocate(curves, geometry, 1, ratio)
    except LrkvError:
        return None
    loss = [{(p.width, p.rank): p.loss for p in side} for pair in curves for side in pair]
    shapes = [
        shape
        for p in plan.layers
        for shape in ((p.key_width, p.key_rank), (p.value_width, p.value_rank))
    ]
    return sum(
        second_order(side[shape], KEY_WEIGHT if n % 2 == 0 else 1.0)
        for n, (side, shape) in enumerate(zip(loss, shapes))
    )


def rank_row(
    layers: list[LayerLook], geometry: Geometry, rank: int, planned: Callable[[float], float | None]
) -> dict:
    """One rank, uniform: cache, errors over layers, predicted KL, and that of a plan of the same
    bytes (None where nothing is saved).
    """

    def errors(side: str) -> dict:
        found = [getattr(layer, side).error(rank) for layer in layers]
        return {
            "mean": sum(found) / len(found),
            "worst": max(found),
            "worst_layer": found.index(max(found)),
        }

    ratio = uniform(geometry, rank).ratio
    return {
        "rank": rank,
        "cache_ratio": ratio,
        "keys": errors("keys"),
        "values": errors("values"),
        "predicted_kl": sum(layer.predicted_kl(rank) for layer in layers),
        "planned_kl": planned(ratio) if ratio < 1 else None,
    }


def recommended(
    layers: list[LayerLook],
    geometry: Geometry,
    ranks: list[int],
    planned: Callable[[float], float | None],
    target_kl: float,
) -> dict:
    """The smallest of the ranks, and the smallest cache ratio, that save something and whose
    predicted KL is at most target_kl. None: there is none.
    """
    rank = next(
        (
            r
            for r in ranks
            if uniform(geometry, r).ratio < 1
            and sum(layer.predicted_kl(r) for layer in layers) <= target_kl
        ),
        None,
    )
    ratio = next((r for r in RATIOS if (kl := planned(r)) is not None and kl <= target_kl), None)
    return {
        "target_kl": target_kl,
        "rank": rank,
        "cache_ratio": ratio,
        "cache_ratio_kl": None if ratio is None else planned(ratio),
    }


def layer_row(
    i: int, layer: LayerLook, ranks: list[int], target_kl: float, geometry: Geometry
) -> dict:
    """One layer. target_kl: the share of one of its sides."""

    def side(spectrum: Spectrum) -> dict:
        small = (
            r
            for r in ranks
            if uniform(geometry, r).ratio < 1 and spectrum.predicted_kl(r) <= target_kl
        )
        return {
            "base_share": spectrum.base_share,
            "rank": next(small, None),
            "energy": spectrum.total,
            "dimensions": {f"{share:.0%}": spectrum.dimensions(share).tolist() for share in SHARES},
            "outside_base": spectrum.outside.tolist(),
            "singular_values": spectrum.singular.tolist(),
            "errors": {str(r): spectrum.error(r) for r in ranks},
            "predicted_kl": {str(r): spectrum.predicted_kl(r) for r in ranks},
        }

    return {
        "layer": i,
        "keys": side(layer.keys),
        "values": side(layer.values),
        "diversity": mean_diversity([layer.gram]),
    }
