"""Open a pretrained checkpoint: a folder, a .gguf file or a hub id; read its tensors one at a time, checked before anything is written.

Folders are read lazily through safetensors, so that no more than one layer is in memory at once. GGUF files are dequantised by transformers
and held in memory, as are pickled weights, which are opened with `weights_only` and nothing else.
"""
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from .device import SAFETENSORS_DTYPES
from .errors import LrkvError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
HEADS = ("lm_head.", "embed_out.", "proj_out.", "final_logits_bias")       # what a whole model has outside its base model, whose name is the prefix


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its name there, its shape and dtype (None for one that no model here could use)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self) -> torch.Tensor:
        """The file is opened for this tensor alone: what an open file has read counts as memory of the process until it is closed."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


@dataclass
class Checkpoint:
    """An opened checkpoint.

    path: the folder; config: the original model's; tensors: name -> where it is stored, or the tensor itself, when in memory; files: the weight files, in order; gguf: name of the GGUF file inside `path`, if that is what it is; source: as the user gave it.
    """

    path: Path
    config: PreTrainedConfig
    tensors: dict[str, Stored | torch.Tensor]
    files: list[Path]
    gguf: str | None = None
    source: str = ""

    def with_prefix(self, prefix: str) -> "Checkpoint":
        """The same checkpoint with the names of a whole model: old files of a bare base model lack its prefix ("transformer.")."""
        if any(name.startswith(prefix) for name in self.tensors):
            return self
        return replace(self, tensors={name if name.startswith(HEADS) else prefix + name: held for name, held in self.tensors.items()})

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
            raise LrkvError(f"cannot read {name} of {self.source}: {error}", "a file is truncated or corrupt; download it again") from error

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
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
        except Exception as error:      # tokenizers raises bare Exceptions of its own
            raise LrkvError(f"{self.source} has no tokenizer that loads: {first_line(error)}",
                            "calibration and comparison need one; put tokenizer.json beside the weights") from error

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what the model class expects. Raises LrkvError naming the first tensor that differs."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LrkvError(f"{self.source} lacks the tensor {missing[0]}{more}", "a shard may be missing; download the checkpoint again")
        for name, shape in expected.items():
            found = self.shape_dtype(name)[0]
            if found != tuple(shape):
                raise LrkvError(f"{self.source}: {name} has shape {found}, its config.json asks for {tuple(shape)}",
                                "weights and config.json do not belong together")

    def finite(self, names: Collection[str]) -> Iterator[tuple[int, int]]:
        """Read each of these tensors once; yields (done, total). Raises LrkvError naming the first one with NaN or Inf. Old files hold masks beside
        weights, in which -inf is meant."""
        for done, name in enumerate(names):
            check_finite(name, self.tensor(name))
            yield done + 1, len(names)


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise LrkvError(f"{name} contains NaN or Inf", "the checkpoint is damaged; nothing sensible can be fitted to it")
    return tensor


def open_checkpoint(model: str) -> Checkpoint:
    """Open `model`: a folder, a path to a .gguf file, or a hub id such as `org/name`. Raises LrkvError."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if not path.exists():
        looks_like_hub = model.count("/") == 1 and not model.startswith((".", "/", "~"))
        if not looks_like_hub:
            raise LrkvError(f"no such model: {model}", "give a folder, a .gguf file or a hub id such as org/name")
        path = _download(model)
    if path.is_file():
        raise LrkvError(f"{model} is a file", "give its folder, or a .gguf file")
    return _open_folder(path, model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    try:
        path = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        if not any(path.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin"])
        return path
    except Exception as error:      # any of the hub's many network and permission errors
        raise LrkvError(f"{hub_id} is neither a folder here nor can it be fetched from the hub: {first_line(error)}",
                        "check the spelling and the network, or give a local folder") from error


def load_config(path: Path, source: str, **kwargs) -> PreTrainedConfig:
    """The checkpoint's config. Raises LrkvError, with transformers' own words where it knows better."""
    if not kwargs and not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"give the file itself: {path / ggufs[0]}" if ggufs else "a model folder has a config.json beside its safetensors"
        raise LrkvError(f"{source} is not a model folder: it has no config.json", hint)
    try:
        raw = {} if kwargs else json.loads((path / "config.json").read_text())
        if raw.get("model_type", "").startswith("lrkv_"):
            raise LrkvError(f"{source} is already an LRKV model", "convert its original instead; lrkv.json names it")
        return AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise LrkvError(f"cannot read the config of {source}: {first_line(error)}", "is config.json whole, and of a known family?") from error


def _open_folder(path: Path, source: str) -> Checkpoint:
    if not any(path.iterdir()):
        raise LrkvError(f"{source} is an empty folder", "a model folder has config.json and model.safetensors")
    config = load_config(path, source)
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise LrkvError(f"{source}: {INDEX} cannot be read: {first_line(error)}", "download it again") from error
        files = sorted({path / name for name in weight_map.values()})
        for file in files:
            if not file.is_file():
                raise LrkvError(f"{source}: the shard {file.name} is missing", "download it again")
    elif (path / SINGLE).is_file():
        files = [path / SINGLE]
    elif bins := sorted(path.glob("pytorch_model*.bin")):
        return _open_pickles(path, source, config, bins)
    else:
        raise LrkvError(f"{source} has no weights", f"looked for {SINGLE}, {INDEX} and pytorch_model.bin")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    part = handle.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                    tensors[name] = Stored(file, name, tuple(part.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise LrkvError(f"{source}: {file.name} is truncated or corrupt: {first_line(error)}", "download it again") from error
    return Checkpoint(path, config, tensors, files, source=source)


def _open_pickles(path: Path, source: str, config, bins: list[Path]) -> Checkpoint:
    tensors: dict[str, torch.Tensor] = {}
    for file in bins:
        try:
            tensors.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:      # torch.load raises UnpicklingError, RuntimeError, EOFError, ValueError ... all mean the same to us
            raise LrkvError(f"{source}: {file.name} does not load with weights_only", "convert it to safetensors; other pickles can run code "
                            "and are never opened") from error
    return Checkpoint(path, config, tensors, bins, source=source)


def _open_gguf(file: Path) -> Checkpoint:
    if not file.is_file():
        raise LrkvError(f"no such file: {file}", "give the path of a .gguf file")
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
    except ImportError as error:
        raise LrkvError("reading .gguf files needs the gguf package", "pip install gguf") from error
    config = load_config(file.parent, str(file), gguf_file=file.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:          # the gguf reader's own errors are many and undocumented
        raise LrkvError(f"{file} cannot be read: {first_line(error)}", "is the file whole?") from error
    for left_over in ("quantization_config", "_name_or_path"):
        if hasattr(config, left_over):
            delattr(config, left_over)
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return Checkpoint(file.parent, config, tensors, [file], gguf=file.name, source=str(file))
