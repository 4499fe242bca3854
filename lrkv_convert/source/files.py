"""Which files of a folder are its weights: those that transformers reads of it, and nothing
else."""

import os
from pathlib import Path

import transformers
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_peft_available

from ..errors import LrkvError
from .checkpoint import INDEX
from .configs import read_object, refuse_adapter

INDICES = (INDEX, "pytorch_model.bin.index.json")
ELSEWHERE = {  # weights that transformers does not read any more, or never did
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
    "model.ckpt.index": "TensorFlow 1's",
    "*.h5": "TensorFlow's",
    "*.msgpack": "Flax's",
    "consolidated.*": "their maker's own form",
    "*.onnx": "ONNX",
    "*.gguf": "GGUF: give the file itself",
    "pytorch_model*.bin": "not under a name that transformers reads",
    "*.safetensors": "not under a name that transformers reads",
    "*.pt": "a trainer's own form",
    "*.pth": "a trainer's own form",
}


def weight_files(path: Path, config: PreTrainedConfig, source: str) -> list[Path]:
    """The files from_pretrained would read, in its order; every one is there. Raises LrkvError."""
    try:
        files = [Path(file) for file in _resolved(path, config)]
    except LrkvError:
        raise
    except Exception as error:  # an index of the wrong kind raises whatever that leads to
        _refuse_index(path, source)
        refuse_adapter(path, source)
        raise LrkvError(
            f"{source} has no weights" + _found_instead(path),
            f"looked for model.safetensors, {INDEX} and pytorch_model.bin",
        ) from error
    if not files:
        _refuse_index(path, source)
        raise LrkvError(f"{source} has no weights: its index names no file", "download it again")
    here = path.resolve()
    for file in files:
        named = str(file.relative_to(path) if file.is_relative_to(path) else file)
        if not Path(_joined(path, file)).is_relative_to(here):
            raise LrkvError(
                f"{source}: its index names {_short(named)}, outside of the folder",
                "weights lie beside their index",
            )
        try:
            there = file.is_file()
        except OSError:  # a name longer than the file system knows
            there = False
        if not there:
            raise LrkvError(f"{source}: the shard {_short(named)} is missing", "download it again")
    return files


def _resolved(path: Path, config: PreTrainedConfig) -> list[str]:
    """transformers' own answer: `_get_resolved_checkpoint_files`, as in releases 5.17 to 5.24,
    which is not part of its interface.

    Of model.safetensors, its index, pytorch_model.bin and its index the first that is there
    counts, or what the config's `transformers_weights` names; an index decides over what else
    lies there. From 5.23 on a distributed checkpoint goes before.
    """
    try:
        from transformers.modeling_utils import _get_resolved_checkpoint_files as resolve
    except ImportError as error:
        raise LrkvError(
            f"transformers {transformers.__version__} finds weights in another way than is known "
            "here",
            "install a release from 5.17 to 5.24",
        ) from error
    try:
        from transformers.distributed.checkpoint import is_sharded_checkpoint
    except ImportError:  # older releases know no such folders
        is_sharded_checkpoint = None
    if is_sharded_checkpoint and is_sharded_checkpoint(path):
        raise LrkvError(
            f"{path} holds a distributed checkpoint (shard-*-model-*.safetensors)",
            "load it with transformers and save_pretrained it whole, then convert that",
        )
    files, _ = resolve(
        pretrained_model_name_or_path=str(path),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
    )
    assert files is not None, "a path was given"
    return files


def _refuse_index(path: Path, source: str) -> None:
    """Raise LrkvError for an index that is not what it should be."""
    for name in INDICES:
        if not (path / name).is_file():
            continue
        try:
            index = read_object(path / name)
        except LrkvError as error:
            raise LrkvError(
                f"{source}: {name} cannot be read: {error.message}", "download it again"
            ) from error
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise LrkvError(
                f"{source}: {name} cannot be read: its weight_map does not map names to files",
                "download it again",
            )
        if not isinstance(index.get("metadata"), dict):
            raise LrkvError(
                f"{source}: {name} cannot be read: it has no metadata, without which transformers "
                "does not take it",
                'add "metadata": {}',
            )


def _found_instead(path: Path) -> str:
    for name in ("model.safetensors", "pytorch_model.bin", *INDICES):
        if (path / name).is_symlink() and not (path / name).exists():
            return f" that can be read: {name} is a link that leads nowhere"
    for pattern, whose in ELSEWHERE.items():
        if found := sorted(file for file in path.glob(pattern) if file.is_file()):
            return f" that can be read: {found[0].name} is {whose}"
    return ""


def _joined(path: Path, file: Path) -> str:
    """Where a name leads, without following links: snapshots of the hub are made of them."""
    return os.path.normpath(
        path.resolve() / (file.relative_to(path) if file.is_relative_to(path) else file)
    )


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else name[:width] + "…"


def adapter_beside(path: Path, source: str) -> list[str]:
    """A notice for adapter files beside whole weights. Raises LrkvError where transformers would
    apply them, which it does where peft is installed and adapter_config.json is there: the model
    is then another than its weights say."""
    files = sorted(
        file.name
        for file in path.glob("adapter_*")
        if file.suffix in (".json", ".safetensors", ".bin")
    )
    if not files:
        return []
    if (path / "adapter_config.json").is_file() and is_peft_available():
        raise LrkvError(
            f"a PEFT adapter lies beside the weights of {source}, and transformers applies it "
            "where peft is installed",
            "merge it (merge_and_unload, save_pretrained), or remove adapter_config.json to "
            "convert the model without it",
        )
    return [
        f"a PEFT adapter lies beside the weights ({', '.join(files)}): it is left out; to convert "
        "with it, merge it first"
    ]
