"""Write a model folder that is either whole or not there: everything goes to <out>.partial, which
is renamed when complete.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..device import SAFETENSORS_DTYPES
from ..errors import LrkvError
from ..format import RECORD  # stands in every folder this project writes, and in no other
from ..settings.fields import LARGEST
from .lock import LOCK, Lock, claim
from .places import HINT, check_folder, remove, remove_folder, special, within, writing
from .store import FINGERPRINT, Store

# appended to the output's name: until it is whole; while it is being replaced
PARTIAL, PREVIOUS = ".partial", ".previous"
WORK = "work"  # inside the partial folder: what a run in progress has worked out
HEALING = f"{WORK}/heal.json"  # what a run of heal was asked for (train/run.py)
REPLACED = ".lrkv-replaced"  # in a folder that was moved out of the way
# of these, one stands in every folder of ours that may be removed
MARKS = (f"{WORK}/{FINGERPRINT}", HEALING, REPLACED)


def check_output(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output folder (`folder_to_make`) that must not be written, or cannot. Raises
    LrkvError.
    """
    with writing(out):
        places = [out.with_name(out.name + end) for end in ("", PARTIAL, PREVIOUS)]
        if source is not None and any(within(source, place) for place in places):
            raise LrkvError(f"the output {out} is the input, or holds it", "give another --out")
        if out.is_symlink():
            raise LrkvError(
                f"the output {out} is a link", "give the folder itself, or another --out"
            )
        if out.exists() and not out.is_dir():
            raise LrkvError(
                f"the output {out} is {'a file' if out.is_file() else 'no folder'}",
                "give a folder that does not exist yet",
            )
        if out.exists() and any(out.iterdir()):
            if not overwrite:
                raise LrkvError(
                    f"the output folder {out} exists", "give another --out, or --overwrite"
                )
            if not (out / RECORD).is_file():
                raise LrkvError(
                    f"{out} holds something other than a converted model",
                    "--overwrite replaces only folders with an lrkv.json",
                )
        for place in places[1:]:
            check_ours(place)
        check_folder(out.parent, what=out)


def check_ours(place: Path) -> None:
    """Raise LrkvError for something at a place we write to and remove that is not known to be
    ours.
    """
    if place.is_symlink() or place.exists() and not ours(place):
        raise LrkvError(
            f"{place} is in the way: it holds something other than an unfinished or a replaced"
            " model",
            "give another --out, or move it",
        )


def ours(folder: Path) -> bool:
    """Whether a folder is one that we made, or holds nothing at all."""
    if not folder.is_dir():
        return False
    return any((folder / mark).is_file() for mark in MARKS) or blank(folder)


def blank(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed as it began."""
    begun = folder / WORK
    return {entry.name for entry in folder.iterdir()} <= {WORK} and (
        not begun.is_dir() or {entry.name for entry in begun.iterdir()} <= {LOCK, "heal.json.tmp"}
    )


def check_shard_size(size: int | str) -> None:
    """Raise LrkvError for a size that is neither bytes nor a number with a unit."""
    if (
        not re.fullmatch(r"\d+|\d+(\.\d+)?[KMGT]B", str(size))
        or not 1 <= _bytes(str(size)) < LARGEST
    ):
        raise LrkvError(
            f"a shard size of {size!r} is not understood",
            "give bytes, or a number with a unit as in 5GB or 500MB",
        )


def _bytes(size: str) -> float:
    """As huggingface_hub reckons."""
    return float(size.rstrip("KMGTB")) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(
        size[-2:-1] if size.endswith("B") else "", 1
    )


@contextmanager
def new_folder(out: Path, fingerprint: dict) -> Iterator[tuple[Path, Store]]:
    """A folder to write into, renamed to `out` if the block ends well and removed if it fails, and
    a Store inside it. Raises LrkvError.

    What a run with this fingerprint that was killed or interrupted left there is found again (the
    interruption says so), what any other left is removed.
    """
    partial = out.with_name(out.name + PARTIAL)
    missing = [folder for folder in out.parents if not folder.exists()]  # deepest first
    lock = None
    check_ours(partial)
    if (partial / HEALING).is_file():
        raise LrkvError(
            f"{partial} holds a run of heal that stopped", "give another --out, or remove it"
        )
    try:
        store, lock = begin(partial, fingerprint)
        yield partial, store
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and any((partial / WORK).glob("*.pt")):
            raise KeyboardInterrupt(
                f"interrupted; the same command goes on from {partial}, which holds what is done"
            ) from None
        if lock is not None or abandoned(partial):
            with suppress(OSError):
                discard(partial)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise LrkvError(f"cannot write {out}: {error.strerror or error}", HINT) from error
        raise
    else:
        try:
            store.clear()
            publish(partial, out)
            Store.discard(out / WORK)
        except BaseException as error:
            raise _homeless(error, partial, out) from error
    finally:
        if lock is not None:
            lock.close()


def begin(partial: Path, fingerprint: dict) -> tuple[Store, Lock]:
    """The store of a run that was stopped there, or a new one in its place, kept for this process.
    Raises LrkvError where another process has it.
    """
    lock = claim(partial / WORK)
    if not (
        Store.holds(partial / WORK, fingerprint)
        and shards_whole(partial, Store(partial / WORK, fingerprint))
    ):
        discard(partial)
        lock.close()
        partial.mkdir(parents=True)
        lock = None
    store = Store(partial / WORK, fingerprint)
    return store, lock or claim(partial / WORK)


def abandoned(partial: Path) -> bool:
    """Whether an unfinished folder is no process's any more."""
    with suppress(LrkvError):
        claim(partial / WORK).close()
        return partial.is_dir() and ours(partial)
    return False


def _homeless(error: BaseException, partial: Path, out: Path) -> BaseException:
    """What is said where a result is whole and cannot have its name."""
    if isinstance(error, OSError):
        return LrkvError(
            f"cannot write {out}: {error.strerror or error}",
            f"the result lies in {partial}: move it",
        )
    return (
        KeyboardInterrupt(f"interrupted; the result lies in {partial}")
        if isinstance(error, KeyboardInterrupt)
        else error
    )


def discard(partial: Path) -> None:
    """Remove an unfinished folder of ours, the mark that says so last."""
    if partial.is_dir():
        for entry in partial.iterdir():
            if entry.name != WORK:
                remove(entry)
        Store.discard(partial / WORK)
        partial.rmdir()


def publish(partial: Path, out: Path) -> None:
    """Give a whole folder its name, in place of what had it. Raises LrkvError if that has become
    somebody else's meanwhile.
    """
    previous = out.with_name(out.name + PREVIOUS)
    if out.exists():
        if not (out / RECORD).is_file() and any(out.iterdir()):
            raise LrkvError(
                f"{out} holds something other than a converted model by now",
                f"the result lies in {partial}: move it",
            )
        if previous.exists() and not ours(previous):
            previous = Path(tempfile.mkdtemp(prefix=previous.name + "-", dir=out.parent))
        remove_folder(previous, last=REPLACED)
        (out / REPLACED).touch()
        out.rename(previous)
    partial.rename(out)
    if previous.is_dir() and ours(previous):
        with suppress(OSError):
            remove_folder(previous, last=REPLACED)


def shards_whole(partial: Path, store: Store) -> bool:
    """Whether the shards a ShardWriter began are all there, at their full length."""
    return "shards" not in store or all(
        (partial / file).is_file() and (partial / file).stat().st_size == size
        for file, size in store.load("shards").items()
    )


class ShardWriter:
    """Writes every tensor to its place in its safetensors shard as it comes, in any order, so that
    memory never holds a shard.

    folder: where, which may hold the shards of an earlier run with the same `shapes`; shapes: name
    -> (shape, dtype) of all tensors there will be; max_shard_size: bytes or a string like "5GB".
    Afterwards `sizes` has the bytes of every file.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_size: int | str,
    ):
        empty = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }
        plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
        self.shapes, self.late, self.place, self.sizes = shapes, set(shapes), {}, {}
        for file, names in plan.filename_to_tensors.items():
            offsets, size = _layout(names, shapes)
            header = _header(offsets, shapes)
            with open(folder / file, "r+b" if (folder / file).exists() else "w+b") as stream:
                stream.write(header)
                stream.truncate(len(header) + size)
            self.sizes[file] = len(header) + size
            self.place |= {
                name: (folder / file, len(header) + offset) for name, offset in offsets.items()
            }
        if plan.is_sharded:
            file_of = {
                name: file for file, names in plan.filename_to_tensors.items() for name in names
            }
            write_json(
                folder / "model.safetensors.index.json",
                {"metadata": plan.metadata, "weight_map": file_of},
            )

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to its planned dtype. An unplanned name or shape is our own
        error.
        """
        shape, dtype = self.shapes[name]
        assert tuple(tensor.shape) == tuple(shape), (
            f"{name}: planned {shape}, got {tuple(tensor.shape)}"
        )
        self.done(name)
        file, offset = self.place[name]
        with open(file, "r+b") as stream:
            stream.seek(offset)
            stream.write(
                tensor.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data
            )

    def done(self, name: str) -> None:
        """This tensor is in place, from now or from an earlier run."""
        self.late.remove(name)

    def finish(self) -> None:
        """Every tensor must have come."""
        assert not self.late, f"never written: {sorted(self.late)[:3]}"


def _layout(names: list[str], shapes: dict) -> tuple[dict[str, int], int]:
    """Offsets of the tensors in a shard's data, widest dtypes first so that all are aligned, and
    its size in bytes.
    """
    offsets, end = {}, 0
    for name in sorted(names, key=lambda n: -shapes[n][1].itemsize):
        offsets[name], end = end, end + math.prod(shapes[name][0]) * shapes[name][1].itemsize
    return offsets, end


def _header(offsets: dict[str, int], shapes: dict) -> bytes:
    """The head of a safetensors file: eight bytes of length, then JSON padded to a multiple of
    eight (the format's own documentation).
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    entries = {
        name: {
            "dtype": names[shapes[name][1]],
            "shape": list(shapes[name][0]),
            "data_offsets": [at, at + math.prod(shapes[name][0]) * shapes[name][1].itemsize],
        }
        for name, at in offsets.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, content) -> None:
    """JSON to a file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Text to a file, through a temporary name, so that it is never half there; pipes and devices
    are written into.
    """
    # names of files may hold bytes that are no characters; in JSON these are their escapes
    data = content.encode("utf-8", "backslashreplace")
    if special(path):
        # /dev/stdout may be a file that holds what was printed before
        shared = os.path.abspath(path).startswith(("/dev/", "/proc/"))
        with open(path, "ab" if shared else "wb") as stream:
            stream.write(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
