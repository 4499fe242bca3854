"""An opened checkpoint: its tensors, read one at a time, and what must hold of them before
anything is written.

Folders are read lazily through safetensors, so that no more than one layer is in memory at once.
GGUF files are dequantised by transformers and held in memory, as are pickled weights, which are
opened with `weights_only` and nothing else.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..device import DTYPES, SAFETENSORS_DTYPES
from ..errors import LrkvError, first_line

INDEX = "model.safetensors.index.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
FLOATS = frozenset(DTYPES.values())  # what weights may be: anything else is quantised, or no weight


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its name there, its shape, and its dtype as the header
    calls it ("BF16")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    header_dtype: str

    @property
    def dtype(self) -> torch.dtype | str:
        """What torch calls it; the header's name for a type that no model here could use."""
        return SAFETENSORS_DTYPES.get(self.header_dtype, self.header_dtype)

    def read(self) -> torch.Tensor:
        """The file is opened for this tensor alone: what an open file has read counts as memory
        of the process until it is closed."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


@dataclass
class Checkpoint:
    """An opened checkpoint.

    path: the folder; config: the original model's; tensors: name -> where it is stored, or the
    tensor itself, when in memory; files: the weight files, in order; gguf: name of the GGUF file
    inside `path`, if that is what it is; source: as the user gave it; notices: what was found and
    does no harm, a line each, for whoever speaks to the user.
    """

    path: Path
    config: PreTrainedConfig
    tensors: dict[str, Stored | torch.Tensor]
    files: list[Path]
    gguf: str | None = None
    source: str = ""
    notices: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as stored. Raises LrkvError for a missing name or unreadable bytes."""
        if name not in self.tensors:
            raise LrkvError(f"{self.source} has no tensor {name}", "is the checkpoint complete?")
        held = self.tensors[name]
        if isinstance(held, torch.Tensor):
            return held
        try:
            return held.read()
        except (SafetensorError, OSError) as error:
            raise LrkvError(
                f"cannot read {name} of {self.source}: {error}",
                "a file is truncated or corrupt; download it again",
            ) from error

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Shape and dtype of one tensor, without reading it."""
        held = self.tensors[name]
        return tuple(held.shape), held.dtype

    def hash(self, progress=lambda done, total: None) -> str:
        """sha256 over the weight files in order."""
        digest, total, done = hashlib.sha256(), sum(f.stat().st_size for f in self.files), 0
        for file in self.files:
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
                    progress(done := done + len(chunk), total)
        return digest.hexdigest()

    def tokenizer(self):
        """The checkpoint's tokenizer. Raises LrkvError if it has none that loads."""
        try:
            if self.gguf:
                return AutoTokenizer.from_pretrained(self.path, gguf_file=self.gguf)
            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # tokenizers raises bare Exceptions of its own
            raise LrkvError(
                f"{self.source} has no tokenizer that loads: {first_line(error)}",
                "calibration and comparison need one; put tokenizer.json beside the weights",
            ) from error

    def lost_tokenizer(self) -> list[str]:
        """A notice for a tokenizer that is there and does not load, so that what is written has
        none."""
        if self.gguf or not any((self.path / name).is_file() for name in TOKENIZERS):
            return []
        try:
            self.tokenizer()
            return []
        except LrkvError as error:
            return [f"no tokenizer is written: {error.message}"]

    def generation_config(self) -> GenerationConfig:
        """The source's own, or what its config says. Raises LrkvError for one that is there and
        cannot be read."""
        if self.gguf or not (self.path / "generation_config.json").is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            return GenerationConfig.from_pretrained(self.path)
        except Exception as error:  # of a list, of numbers where texts belong: each its own
            raise LrkvError(
                f"cannot read generation_config.json of {self.source}: {first_line(error)}",
                "mend it, or remove it to do without",
            ) from error

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and types with what the model class expects. Raises LrkvError
        naming the first that differs."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LrkvError(
                f"{self.source} lacks the tensor {missing[0]}{more}",
                "a shard may be missing; download the checkpoint again",
            )
        for name, shape in expected.items():
            found, dtype = self.shape_dtype(name)
            if found != tuple(shape):
                raise LrkvError(
                    f"{self.source}: {name} has shape {found}, its config.json asks for "
                    f"{tuple(shape)}",
                    "weights and config.json do not belong together",
                )
            if dtype not in FLOATS:
                raise LrkvError(
                    f"{self.source}: {name} holds {str(dtype).removeprefix('torch.')}, which is "
                    "no type of weights here",
                    f"{', '.join(DTYPES)} are; convert the full-precision checkpoint, then "
                    "quantise",
                )

    def finite(
        self, names: Collection[str], stored: torch.dtype | None = None
    ) -> Iterator[tuple[int, int]]:
        """Read each of these tensors once; yields (done, total). Raises LrkvError naming the
        first one with NaN or Inf, or that has them once it is written as `stored`. Old files hold
        masks beside weights, in which -inf is meant."""
        for done, name in enumerate(names):
            check_finite(name, self.tensor(name), stored)
            yield done + 1, len(names)


def check_finite(
    name: str, tensor: torch.Tensor, stored: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor, as `stored` if that is given. Raises LrkvError for NaN or Inf in it, before or
    after."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise LrkvError(
            f"{name} contains NaN or Inf",
            "the checkpoint is damaged; nothing sensible can be fitted to it",
        )
    if stored is None:
        return tensor
    cast = tensor.to(stored)
    narrower = stored.itemsize < tensor.dtype.itemsize or stored == torch.float16
    if narrower and not torch.isfinite(cast).all():
        raise LrkvError(
            f"{name} holds {tensor.abs().max().item():.3g}, more than "
            f"{str(stored).removeprefix('torch.')} can",
            "give a wider --dtype: bfloat16 or float32",
        )
    return cast
