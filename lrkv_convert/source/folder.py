"""Open a pretrained checkpoint: a folder, a .gguf file or a hub id."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import LrkvError, first_line
from .checkpoint import INDEX, Checkpoint, Stored
from .configs import check_companions, load_config, parse_config, read_config_json
from .files import adapter_beside, weight_files
from .pickles import read_pickles

HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]


def open_checkpoint(model: str) -> Checkpoint:
    """Open the original `model`: a folder, a path to a .gguf file, or a hub id such as
    `org/name`. Raises LrkvError."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        from .gguf import open_gguf

        return open_gguf(path)
    if not path.exists():
        looks_like_hub = model.count("/") == 1 and not model.startswith((".", "/", "~"))
        if not looks_like_hub:
            raise LrkvError(
                f"no such model: {model}",
                "give a folder, a .gguf file or a hub id such as org/name",
            )
        path = _download(model)
    if path.is_file():
        raise LrkvError(f"{model} is a file", "give its folder, or a .gguf file")
    if not any(path.iterdir()):
        raise LrkvError(
            f"{model} is an empty folder", "a model folder has config.json and model.safetensors"
        )
    return open_folder(path, model, load_config(path, model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        if not any((path / name).is_file() for name in ("model.safetensors", INDEX)):
            snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin"])
        return path
    except Exception as error:  # any of the hub's many network and permission errors
        raise LrkvError(
            f"{hub_id} is neither a folder here nor can it be fetched from the hub: "
            f"{first_line(error)}",
            "check the spelling and the network, or give a local folder",
        ) from error


def open_folder(path: Path, source: str, config=None) -> Checkpoint:
    """A model folder, original or converted: its config (read here by default) and what its
    weight files hold. Raises LrkvError."""
    if config is None:
        read_config_json(path, source)
        config = parse_config(path, source)
    files = weight_files(path, config, source)
    check_companions(path)
    pickled = [file for file in files if file.suffix != ".safetensors"]
    if pickled and len(pickled) < len(files):
        raise LrkvError(
            f"{source}: its index names safetensors and other files at once",
            "save the model again in one form",
        )
    tensors: dict[str, Any] = read_pickles(files, source) if pickled else _headers(files, source)
    opened = Checkpoint(
        path, config, tensors, files, source=source, notices=adapter_beside(path, source)
    )
    opened.generation_config()  # what cannot be read is told now
    return opened


def _headers(files: list[Path], source: str) -> dict[str, Stored]:
    """Every tensor of these safetensors files; where two have one of the same name, the later, as
    transformers has it."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (handle is no dict)
                    part = handle.get_slice(name)
                    tensors[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise LrkvError(
                f"{source}: {file.name} is truncated or corrupt: {first_line(error)}",
                "download it again",
            ) from error
    return tensors
