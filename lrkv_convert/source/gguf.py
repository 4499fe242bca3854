"""Open a .gguf file: transformers dequantises it; here its header is checked first, and what
transformers leaves out is put back."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..errors import LrkvError, first_line
from .checkpoint import Checkpoint
from .configs import load_config
from .gguf_header import Header, read_header
from .gguf_rope import TENSORS, scale_rope
from .names import describe

TABLES = (*TENSORS, "attn_rot_embd.weight")  # of rotations, no weights


def gguf_config(file: Path) -> PreTrainedConfig:
    """The config of a .gguf file, with its scaling of RoPE. Raises LrkvError."""
    return _read(file)[0]


def _read(file: Path) -> tuple[PreTrainedConfig, Header]:
    if not file.is_file():
        raise LrkvError(f"no such file: {file}", "give the path of a .gguf file")
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
    except ImportError as error:
        raise LrkvError("reading .gguf files needs the gguf package", "pip install gguf") from error
    header = read_header(file)
    config = load_config(file.parent, str(file), gguf_file=file.name)
    scale_rope(config, header)
    return config, header


def open_gguf(file: Path) -> Checkpoint:
    """Raises LrkvError for a file that is cut, lacks a tensor, or holds one that transformers
    would leave out."""
    config, header = _read(file)
    for left_over in ("quantization_config", "_name_or_path"):
        if hasattr(config, left_over):
            delattr(config, left_over)
    check_sizes(config, header)
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=copy.deepcopy(config),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # the gguf reader's own errors are many and undocumented
        raise LrkvError(
            f"{file} cannot be read: {first_line(error)}", "is the file whole?"
        ) from error
    if (
        bad := sorted(info["missing_keys"])
        or sorted(info["unexpected_keys"])
        or sorted(map(str, info.get("mismatched_keys") or ()))
    ):
        raise LrkvError(
            f"{file} and the model it describes differ in {bad[0]}",
            "convert the original folder instead of its GGUF",
        )
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or {})
        if config.tie_word_embeddings
        else set()
    )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return Checkpoint(file.parent, config, tensors, [file], gguf=file.name, source=str(file))


def check_sizes(config: PreTrainedConfig, header: Header) -> None:
    """Raise LrkvError unless the file holds as many weights as the model has: transformers makes
    up what is missing, and leaves out what has no place."""
    weights = {
        name: tensor.numel for name, tensor in header.tensors.items() if not name.endswith(TABLES)
    }
    tensors: dict[str, Any] = {name: header.tensors[name] for name in weights}
    outline = Checkpoint(
        header.file.parent,
        config,
        tensors,
        [],
        source=str(header.file),
    )
    model = describe(outline)
    tied = model.all_tied_weights_keys
    wanted = sum(
        p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied
    )
    held = sum(count for name, count in weights.items() if not (tied and name == "output.weight"))
    if held != wanted:
        raise LrkvError(
            f"{header.file} holds {held:,} weights, the model it describes has {wanted:,}",
            "tensors are missing, or are of another model; convert the original folder instead",
        )
