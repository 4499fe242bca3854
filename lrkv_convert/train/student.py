"""The model that trains: which of its weights do, in which precision they are held, and what of
them a checkpoint keeps.
"""

from pathlib import Path

import torch
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import LrkvError
from ..families import Adapter

WRAPPED = "module."  # before the names of a model that several processes train


def choose_trained(model: PreTrainedModel, adapter: Adapter, train: str) -> None:
    """Freeze what does not train. "attention": the attention modules, which hold W_shared, C, U, B,
    biases, W_Q and W_O; "all": everything.
    """
    model.requires_grad_(train == "all")
    for layer in model.get_submodule(adapter.layer_path):
        layer.get_submodule(adapter.attention).requires_grad_(True)
    # a short training has nothing to fear from overfitting, and the teacher has none
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        without_dropout(module)
    # Falcon looks there; what is written is the config of the folder
    without_dropout(model.config)


def without_dropout(holder) -> None:
    """Every number of a module or config that is called some dropout becomes zero."""
    for name in [
        name
        for name, value in vars(holder).items()
        if "drop" in name and type(value) in (int, float)
    ]:
        setattr(holder, name, type(getattr(holder, name))(0))


def set_precision(student: PreTrainedModel, adapter: Adapter, frozen: torch.dtype) -> None:
    """float32 for what trains (autocast makes bfloat16 of it) and for what lies outside the
    matrices of the layers, experts included; those, if they are frozen, in `frozen`.
    """
    layers = student.get_submodule(adapter.layer_path)
    matrices = {id(p) for p in layers.parameters() if p.ndim >= 2 and not p.requires_grad}
    for parameter in student.parameters():
        parameter.data = parameter.data.to(frozen if id(parameter) in matrices else torch.float32)


def trained(model: nn.Module) -> list[str]:
    """Names of what trains, as in a model that is not wrapped."""
    return [name.removeprefix(WRAPPED) for name, p in model.named_parameters() if p.requires_grad]


def only_trained(models: list, weights: list[dict], folder: str) -> None:
    """What a checkpoint holds of a model: frozen weights stand in the converted folder, and the
    names are those of one process.
    """
    for model, state in zip(models, weights):
        kept = {name: state.get(name, state.get(WRAPPED + name)) for name in trained(model)}
        state.clear()
        state.update(kept)


def load_trained(models: list, folder: str) -> None:
    """Put what `only_trained` kept into the models, and leave none for accelerate to load. Raises
    LrkvError where something is missing.
    """
    while models:
        model = models.pop()
        state = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
        if missing := set(trained(model)) - state.keys():
            raise LrkvError(f"{folder} lacks {sorted(missing)[0]}", "begin anew with --overwrite")
        names = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                names[name if name in names else WRAPPED + name].copy_(value)
