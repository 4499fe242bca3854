"""The front door: what a folder, a .gguf file or a hub id holds, read as transformers reads it
and checked before anything is written."""

from .checkpoint import INDEX, Checkpoint, check_finite
from .folder import open_checkpoint, open_folder

__all__ = ["INDEX", "Checkpoint", "check_finite", "open_checkpoint", "open_folder"]
