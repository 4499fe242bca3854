"""The model that trains: which of its weights do, and in which precision they are held."""

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ..errors import LrkvError
from ..families import Family, Site
from ..modeling.encoder_decoder_lrkv import FIELDS

AUGMENTED = "apply_spec_augment"  # in a speech model's config: parts of what it hears are masked


def converted_sites(family: Family, config) -> list[Site]:
    """The attention modules of a converted model that are converted. Raises LrkvError for a model
    without any.
    """
    kinds = [kind for kind in family.kinds if getattr(config, FIELDS[kind], None) is not None]
    if not kinds:
        raise LrkvError(
            f"this {config.model_type} has no converted attention: its config says nothing of it",
            "make a converted model with lrkv convert MODEL --out DIR",
        )
    return family.sites(config, kinds)


def choose_trained(model: PreTrainedModel, sites: list[Site], train: str) -> None:
    """Freeze what does not train. "attention": the attention modules of these sites, which hold
    W_shared, C, U, B, biases, W_Q and W_O; "all": everything but what the model's class holds fixed
    (sinusoidal positions).
    """
    model.requires_grad_(False)
    if train == "all":
        kept = fixed(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in kept)
    for site in sites:
        model.get_submodule(site.path).requires_grad_(True)
    # a short training has nothing to fear from overfitting, and the teacher has no chance in it
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        without_chance(module)
    # Falcon looks there; what is written is the config of the folder
    without_chance(model.config)


def fixed(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that a model is built with and never trains."""
    with init_empty_weights(include_buffers=False):
        built = type(model)(model.config)
    return {name for name, p in built.named_parameters() if not p.requires_grad}


def without_chance(holder) -> None:
    """Every number of a module or config that is called some dropout becomes zero, and no masks
    are drawn for speech.
    """
    for name, value in list(vars(holder).items()):
        if "drop" in name and type(value) in (int, float) or name == AUGMENTED:
            setattr(holder, name, type(value)(0))


def set_precision(student: PreTrainedModel, family: Family, frozen: torch.dtype) -> None:
    """float32 for what trains (autocast makes bfloat16 of it) and for what lies outside the
    matrices of the layers, experts included; those, if they are frozen, in `frozen`.
    """
    matrices = {
        id(p)
        for path in stacks(family)
        for p in student.get_submodule(path).parameters()
        if p.ndim >= 2 and not p.requires_grad
    }
    for parameter in student.parameters():
        parameter.data = parameter.data.to(frozen if id(parameter) in matrices else torch.float32)


def stacks(family: Family) -> list[str]:
    """Paths of the layers in the model: the decoder's and, if it has one, the encoder's."""
    encoder = family.encoder
    return [family.any.layer_path, *([f"{encoder.path}.{encoder.layers}"] if encoder else [])]
