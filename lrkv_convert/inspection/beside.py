"""After a conversion: how far each head is from what it was. The original is streamed, the
converted model held in memory.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..device import pick_device
from ..errors import LrkvError
from ..evaluate.load import load_model, read_config
from ..examples.example import tokens_of
from ..examples.measured import MeasuredOn, described, examples_of
from ..families import CONVERTED, Family, Site
from ..folder.companions import FIELDS
from ..folder.provenance import calibrated_on
from ..modeling import attention_class, auto_class
from ..study import Progress, Study
from .diversity import mean_diversity
from .fidelity import LayerFidelity, fidelity

TOKENS = 4096


def beside(
    model: str,
    original: str,
    given: MeasuredOn,
    max_tokens: int | None,
    device: str,
    progress: Progress,
) -> dict:
    """How far the converted folder `model` is from its original, head by head, on what is given
    (default: what ships here). Raises LrkvError.
    """
    config = read_config(model)
    study = Study(original, lambda family: converted_kinds(config, family), progress)
    checkpoint, family = study.checkpoint, study.family
    check_pair(model, config, study)
    material = given.or_built_in(family).read(original, family, max_tokens or TOKENS)
    skeleton = study.build(pick_device(device))
    study.check()
    examples = examples_of(material, checkpoint, study.whole)
    converted = load_model(model, skeleton.device, torch.float32, auto_class(family.model_type))
    found = fidelity(
        skeleton,
        study.sites,
        converted,
        examples,
        lambda done, total: progress("comparing", done, total),
    )
    text = described(material)
    return {
        "model": model,
        "kind": "converted",
        "original": Path(original).name,
        "notices": checkpoint.notices,
        "text": {**text, "calibrated_on": text["sha256"] in calibrated_on(model)},
        "tokens": tokens_of(examples),
        "attention": {
            kind: kind_row(study.layers, sites, [found[site] for site in sites])
            for kind, sites in study.by_kind.items()
        },
    }


def converted_kinds(config, family: Family) -> list[str]:
    """The kinds of attention that a converted model's config has shapes of."""
    return [kind for kind in family.kinds if getattr(config, FIELDS[kind], None) is not None]


def check_pair(model: str, config, study: Study) -> None:
    """Raise LrkvError for a converted model of other shapes than the original, and for a family
    whose scores cannot be seen.
    """
    adapter = study.family.any
    if (
        config.model_type != f"{CONVERTED}{adapter.model_type}"
        or study.family.sites(config, study.kinds) != study.sites
    ):
        raise LrkvError(
            f"{model} was not converted from {study.model}: their family or shapes differ",
            "give its own --original",
        )
    if attention_class(adapter.model_type).attends_itself:
        raise LrkvError(
            f"the scores of {adapter.model_type} cannot be seen: transformers computes them past"
            " its attention interface",
            "lrkv compare gives perplexity and KL",
        )


def kind_row(layers: int, sites: Sequence[Site], found: list[LayerFidelity]) -> dict:
    """One kind of attention of a stack of so many layers: means, and every site."""
    before, after = (
        mean_diversity([row.original for row in found]),
        mean_diversity([row.converted for row in found]),
    )
    return {
        "geometry": {"layers": layers, **asdict(sites[0].geometry)},
        "diversity": {"original": before, "converted": after, "kept": kept(before, after)},
        "similarity": mean_over(found, "similarity"),
        "logit_error": mean_over(found, "logit_error"),
        "attention_kl": mean_over(found, "kl"),
        "output_error": sum(row.output_error for row in found) / len(found),
        "layers": [fidelity_row(site.layer, row) for site, row in zip(sites, found)],
    }


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
