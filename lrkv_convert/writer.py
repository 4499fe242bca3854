"""Write a model folder that is either whole or not there: everything goes to <out>.partial, which is renamed when complete."""
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from .errors import LrkvError

RECORD = "lrkv.json"    # stands in every folder this project writes, and in no other


def check_output(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that must not be written. Raises LrkvError."""
    if source is not None and (out.resolve() == source.resolve() or out.resolve() in source.resolve().parents):
        raise LrkvError(f"the output {out} is the input, or holds it", "give another --out")
    if out.is_file():
        raise LrkvError(f"the output {out} is a file", "give a folder that does not exist yet")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise LrkvError(f"the output folder {out} exists", "give another --out, or --overwrite")
        if not (out / RECORD).is_file():
            raise LrkvError(f"{out} holds something other than a converted model", "--overwrite replaces only folders with an lrkv.json")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `out` if the block ends well and removed if it does not, Ctrl-C included. Raises LrkvError."""
    partial = out.with_name(out.name + ".partial")
    missing = [folder for folder in out.parents if not folder.exists()]     # deepest first
    try:
        shutil.rmtree(partial, ignore_errors=True)      # left by a run that was killed
        partial.mkdir(parents=True)
        yield partial
        previous = out.with_name(out.name + ".previous")
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)
            out.rename(previous)
        partial.rename(out)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise LrkvError(f"cannot write {out}: {error.strerror or error}", "check permissions and free space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing if not out.exists() else ():
            with suppress(OSError):
                folder.rmdir()


class ShardWriter:
    """Collects tensors in any order and writes each safetensors shard as soon as it is complete.

    folder: where; shapes: name -> (shape, dtype) of all tensors there will be; max_shard_size: bytes or a string like "5GB".
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], max_shard_size: int | str):
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
        plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
        self.folder, self.shapes = folder, shapes
        self.file_of = {name: file for file, names in plan.filename_to_tensors.items() for name in names}
        self.missing = {file: set(names) for file, names in plan.filename_to_tensors.items()}
        self.held: dict[str, dict[str, Tensor]] = {file: {} for file in self.missing}
        self.index = {"metadata": plan.metadata, "weight_map": self.file_of} if plan.is_sharded else None

    def add(self, name: str, tensor: Tensor) -> None:
        """Hand over one tensor; it is cast to its planned dtype. An unplanned name or shape is our own error."""
        shape, dtype = self.shapes[name]
        assert tuple(tensor.shape) == tuple(shape), f"{name}: planned {shape}, got {tuple(tensor.shape)}"
        file = self.file_of[name]
        self.missing[file].remove(name)
        self.held[file][name] = tensor.to("cpu", dtype).contiguous()
        if not self.missing[file]:
            try:
                save_file(self.held.pop(file), self.folder / file, metadata={"format": "pt"})
            except Exception as error:      # safetensors reports a full disk as its own SafetensorError
                raise OSError(getattr(error, "errno", None) or 0, f"{file}: {error}") from error

    def finish(self) -> None:
        """Write the index. Every tensor must have come."""
        late = [name for names in self.missing.values() for name in names]
        assert not late, f"never written: {late[:3]}"
        if self.index is not None:
            write_json(self.folder / "model.safetensors.index.json", self.index)


def write_json(path: Path, content) -> None:
    """JSON to a file, through a temporary name, so that it is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
