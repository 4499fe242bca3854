"""What a checkpoint keeps of the model: what trains, under the names of one process. The rest
stands in the converted folder.
"""

from pathlib import Path

import torch
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ..errors import LrkvError

WRAPPED = "module."  # before the names of a model that several processes train


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
