"""After a conversion: how far each head is from what it was. The original is streamed, the
converted model held in memory.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..conversion import open_model
from ..device import pick_device
from ..errors import LrkvError
from ..evaluate.load import load_model
from ..examples.text import BUILT_IN, Text, read_texts
from ..families import Adapter, Geometry
from ..folder.provenance import calibrated_on
from ..source.skeleton import Skeleton
from .diversity import mean_diversity
from .fidelity import LayerFidelity, fidelity
from .text import text_windows

TOKENS = 4096
Progress = Callable[[str, int, int], None]


def beside(
    model: str,
    original: str,
    text: Text | None,
    max_tokens: int | None,
    device: str,
    progress: Progress,
) -> dict:
    """How far the converted folder `model` is from its original, head by head, on a text (default:
    what ships here). Raises LrkvError.
    """
    checkpoint, adapter = open_model(original)
    geometry = adapter.geometry(checkpoint.config)
    skeleton = Skeleton(checkpoint, adapter, pick_device(device))
    text = text or read_texts([BUILT_IN])[0]
    tokens = text_windows(text, checkpoint, max_tokens or TOKENS)
    converted = load_model(model, skeleton.device, torch.float32)
    check_pair(model, converted.config, original, adapter, geometry)
    layers = fidelity(
        skeleton,
        geometry,
        converted,
        tokens,
        lambda done, total: progress("comparing", done, total),
    )
    before, after = (
        mean_diversity([layer.original for layer in layers]),
        mean_diversity([layer.converted for layer in layers]),
    )
    return {
        "model": model,
        "kind": "converted",
        "original": Path(original).name,
        "geometry": asdict(geometry),
        "text": {
            "name": text.name,
            "sha256": text.sha256,
            "calibrated_on": text.sha256 in calibrated_on(model),
        },
        "tokens": tokens.numel(),
        "diversity": {"original": before, "converted": after, "kept": kept(before, after)},
        "similarity": mean_over(layers, "similarity"),
        "logit_error": mean_over(layers, "logit_error"),
        "attention_kl": mean_over(layers, "kl"),
        "output_error": sum(layer.output_error for layer in layers) / len(layers),
        "layers": [fidelity_row(i, layer) for i, layer in enumerate(layers)],
    }


def check_pair(model: str, config, original: str, adapter: Adapter, geometry: Geometry) -> None:
    """Raise LrkvError for a converted model of other shapes than the original, and for a family
    whose scores cannot be seen.
    """
    if config.model_type != f"lrkv_{adapter.model_type}" or adapter.geometry(config) != geometry:
        raise LrkvError(
            f"{model} was not converted from {original}: their family or shapes differ",
            "give its own --original",
        )
    if adapter.legacy:
        raise LrkvError(
            f"the scores of {adapter.model_type} cannot be seen: transformers computes them past"
            " its attention interface",
            "lrkv compare gives perplexity and KL",
        )


def kept(before: dict, after: dict) -> dict:
    """Diversity after a conversion as a share of that before."""
    return {
        name: after[name] / before[name] if before[name] else None for name in ("plain", "centred")
    }


def mean_over(layers: list[LayerFidelity], name: str) -> float:
    """Mean of a figure per head over all heads of all layers."""
    return torch.stack([getattr(layer, name) for layer in layers]).mean().item()


def fidelity_row(i: int, layer: LayerFidelity) -> dict:
    before, after = mean_diversity([layer.original]), mean_diversity([layer.converted])
    return {
        "layer": i,
        "diversity": {"original": before, "converted": after, "kept": kept(before, after)},
        "similarity": layer.similarity.tolist(),
        "logit_error": layer.logit_error.tolist(),
        "attention_kl": layer.kl.tolist(),
        "output_error": layer.output_error,
    }
