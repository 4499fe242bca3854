"""Pickled weights (.bin): opened with `weights_only`, which runs no code, and held in memory."""

from pathlib import Path
from zipfile import is_zipfile

import torch

from ..errors import LrkvError


def read_pickles(files: list[Path], source: str) -> dict[str, torch.Tensor]:
    """The tensors of all files; where two have one of the same name, the later. Raises
    LrkvError."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:  # files older than torch 1.6 are no zip archives, which alone can be mapped
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        # UnpicklingError, RuntimeError, EOFError, ValueError ... all mean the same to us
        except Exception as error:
            raise LrkvError(
                f"{source}: {file.name} does not load with weights_only",
                "convert it to safetensors; other pickles can run code and are never opened",
            ) from error
        tensors.update(_state_dict(found, f"{source}: {file.name}"))
    return tensors


def _state_dict(found, what: str) -> dict[str, torch.Tensor]:
    """Names and tensors, or LrkvError saying what the pickle holds instead."""
    if not isinstance(found, dict):
        raise LrkvError(
            f"{what} holds no dictionary of tensors but a {type(found).__name__}",
            "save the model's state_dict()",
        )
    for name, value in found.items():
        if isinstance(value, dict) and any(
            isinstance(inner, torch.Tensor) for inner in value.values()
        ):
            raise LrkvError(
                f"{what} is a trainer's checkpoint: weights stand inside it under {name!r}, where "
                "transformers does not look",
                f"take them out: torch.save(torch.load(FILE)[{name!r}], FILE)",
            )
    for name, value in found.items():
        if not isinstance(name, str):
            raise LrkvError(
                f"{what} has a key that is no text: {str(name)[:60]!r}",
                "save the model's state_dict()",
            )
        if not isinstance(value, torch.Tensor):
            raise LrkvError(
                f"{what} holds a {type(value).__name__} under {name[:60]!r}, no tensor",
                "save the model's state_dict()",
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise LrkvError(
                f"{what}: {name} is sparse, quantised or without content",
                "save it as a plain tensor",
            )
    return found
