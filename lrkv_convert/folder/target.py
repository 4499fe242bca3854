"""What a converted folder's weights are to be: the names and shapes of its own model class."""

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from ..modeling import CLASSES


def empty_target(config) -> PreTrainedModel:
    """The converted model's own class, built without memory: its names and shapes are what must be
    written.
    """
    with init_empty_weights(include_buffers=False):
        return (
            CLASSES[config.model_type.removeprefix("lrkv_")][2](config).eval().requires_grad_(False)
        )


def tensor_shapes(
    model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a model's checkpoint; tied ones stand once. Of a model
    that was loaded what is tied indeed counts.
    """
    tied = set(model.all_tied_weights_keys)
    return {
        name: (tuple(p.shape), dtype)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in tied
    }
