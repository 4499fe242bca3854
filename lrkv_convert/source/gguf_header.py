"""The header of a .gguf file, read within the bounds of the file: what it says of itself, before
any library believes it.

"GGUF", version, tensor count, key count; keys: name, type, value; tensors: name, dimensions,
type, offset; padding; data
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import LrkvError

NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}  # type -> its form
TEXT, ARRAY, F32 = 8, 9, 0
KEPT = 64  # values of an array that are kept: of vocabularies nobody here asks


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its shape as torch has it, ggml's number of its type, and the bytes
    from `start` on."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """keys: the metadata; tensors: by their names in the file."""

    file: Path
    keys: dict
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.keys["general.architecture"]

    def value(self, name: str, default=None):
        """What the file says of its architecture, e.g. "rope.scaling.factor"."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    def floats(self, name: str) -> torch.Tensor:
        """A float32 tensor (n,). Raises LrkvError for another type."""
        tensor = self.tensors[name]
        if tensor.ggml_type != F32:
            raise LrkvError(
                f"{self.file}: its scaling of RoPE stands in {name}, which is not float32",
                "write the file again with llama.cpp's converter",
            )
        return torch.from_numpy(
            np.fromfile(self.file, "<f4", tensor.numel, offset=tensor.start)
        ).flatten()


class Cut(Exception):
    """The file ends, or what it counts does."""


def read_header(file: Path) -> Header:
    """Raises LrkvError for a file that is no GGUF, is cut off, or counts more than it holds."""
    try:
        data = np.memmap(file, mode="r", dtype=np.uint8)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise LrkvError(
            f"{file} cannot be read: it is empty, or may not be read", "is the file whole?"
        ) from error
    try:
        return _Reader(data).header(file)
    except (Cut, struct.error, UnicodeDecodeError, OverflowError) as error:
        what = str(error) if isinstance(error, Cut) else "it ends before its header does"
        raise LrkvError(
            f"{file} cannot be read: {what}", "is the file whole? download it again"
        ) from error


class _Reader:
    """A place in the bytes of a file."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise Cut("it ends before its header does")
        self.at += count
        return self.data[self.at - count : self.at].data

    def number(self, form: str):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least: int) -> int:
        """A count of things that take at least so many bytes each, which must fit into what is
        left."""
        count = self.number("<Q")
        if count * least > len(self.data) - self.at:
            raise Cut(f"it counts {count:,} things where there is no room for them")
        return count

    def text(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode()

    def value(self, kind: int):
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise Cut(f"its header has a value of the unknown type {kind}")
        kind = self.number("<I")
        if kind in NUMBERS:
            size, count = struct.calcsize(NUMBERS[kind]), self.count(struct.calcsize(NUMBERS[kind]))
            values = self.take(count * size)
            return [
                struct.unpack(NUMBERS[kind], values[i * size : (i + 1) * size])[0]
                for i in range(min(count, KEPT))
            ]
        if kind != TEXT:
            raise Cut(f"its header has a list of the unknown type {kind}")
        for _ in range(self.count(8)):
            self.take(self.number("<Q"))
        return []

    def header(self, file: Path) -> Header:
        from gguf import GGML_QUANT_SIZES

        if bytes(self.take(4)) != b"GGUF":
            raise Cut("it does not begin as a GGUF file does")
        if (version := self.number("<I")) not in (2, 3):
            raise Cut(f"it is of GGUF version {version}, 2 and 3 are known")
        tensors, keys, listed, sizes = (
            self.count(24),
            {},
            [],
            {int(kind): size for kind, size in GGML_QUANT_SIZES.items()},
        )
        for _ in range(self.count(13)):
            name = self.text()
            keys[name] = self.value(self.number("<I"))
        if not isinstance(keys.get("general.architecture"), str):
            raise Cut("it does not name its architecture")
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("<I")
            if dimensions > 8:
                raise Cut(f"its tensor {name[:60]} has {dimensions:,} dimensions")
            shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))))
            listed.append((name, shape, self.number("<I"), self.number("<Q")))
        padding = keys.get("general.alignment", 32)
        if not isinstance(padding, int) or padding < 1:
            raise Cut(f"its alignment is {padding}")
        start, found = -(-self.at // padding) * padding, {}
        for name, shape, kind, offset in listed:
            if kind not in sizes:
                raise Cut(f"its tensor {name[:60]} is of the unknown type {kind}")
            block, size = sizes[kind]
            found[name] = Tensor(shape, kind, start + offset, -(-math.prod(shape) // block) * size)
            if found[name].start + found[name].size > len(self.data):
                raise Cut(f"it ends before its tensor {name[:60]} does")
        return Header(file, keys, found)
