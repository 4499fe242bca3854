"""Text -> metrics, one layer at a time.

The original model is built on the meta device and its layers are filled in turn, so memory holds one layer, the hidden states of the
calibration windows and one layer's sums. Attention runs eagerly, because the metrics need its weights.
"""
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .adapters import Adapter, AttentionWeights, Geometry
from .checkpoint import Checkpoint
from .errors import LrkvError
from .metrics import MetricSums

SEQ_LEN = 512
BUILT_IN = "built-in"


@dataclass(frozen=True)
class Text:
    """A named text. `sha256` is of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(paths: list[str]) -> list[Text]:
    """Texts from files and folders (every *.txt and *.md inside), or the text that ships with this package. Raises LrkvError."""
    if paths == [BUILT_IN]:
        return [Text(BUILT_IN, resources.files("lrkv_convert").joinpath("data/calibration.txt").read_text(encoding="utf-8"))]
    texts = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
        if not files:
            raise LrkvError(f"{path} holds no .txt or .md file", "give text files, or a folder of them")
        for file in files:
            try:
                texts.append(Text(file.name, file.read_text(encoding="utf-8")))
            except OSError as error:
                raise LrkvError(f"cannot read the text {file}: {error.strerror}", "check the path") from error
            except UnicodeDecodeError as error:
                raise LrkvError(f"{file} is not UTF-8 text", "convert it, or give another text") from error
    return texts


def window_length(config) -> int:
    """Tokens per calibration window: SEQ_LEN, or what the model can read."""
    return min(SEQ_LEN, getattr(config, "max_position_embeddings", None) or SEQ_LEN)


def windows(texts: list[Text], tokenizer, seq_len: int, max_tokens: int) -> Tensor:
    """Token windows (n, T), an equal share of each text, spread evenly over it. Raises LrkvError if no text fills one window."""
    cut = []
    for text in texts:
        ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)                      # (all, T)
        keep = min(len(whole), max(1, max_tokens // len(texts) // seq_len))
        cut.append(whole[torch.linspace(0, len(whole) - 1, keep).round().long()] if keep else whole)
    found = torch.cat(cut)
    if not len(found):
        raise LrkvError(f"the calibration text is empty or too short: no text fills one window of {seq_len} tokens",
                        "give a longer text, or several kilobytes of anything like what the model will read")
    return found


class Skeleton:
    """The original model on the meta device, filled a part at a time from its checkpoint. Buffers (RoPE frequencies) are real."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, device: torch.device):
        self.checkpoint, self.adapter, self.device = checkpoint, adapter, device
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="eager", dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.layers = self.model.get_submodule(adapter.layer_path)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes the checkpoint must have; tied tensors stand once."""
        tied = set(self.model._tied_weights_keys or {}) if self.checkpoint.config.tie_word_embeddings else set()
        return {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False) if name not in tied}

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Put float32 weights into a module on the device."""
        state = {name: self.checkpoint.tensor(f"{prefix}{name}").to(self.device, torch.float32) for name, _ in module.named_parameters()}
        module.load_state_dict(state, strict=False, assign=True)
        module.to(self.device)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list["Recorder"]]:
        """Everything before the first layer: tokens (n, T) -> hidden states (n, T, D), and what else each layer is called with."""
        base = self.model.get_submodule(self.adapter.prefix.rstrip("."))
        layers, recorders = self.layers, nn.ModuleList(Recorder(layer) for layer in self.layers)
        where, name = self.adapter.layer_path.rsplit(".", 1)
        setattr(self.model.get_submodule(where), name, recorders)
        for child_name, child in base.named_children():
            if child is not recorders:
                self.fill(child, f"{self.adapter.prefix}{child_name}.")
        hidden = []
        for row in tokens:
            base(input_ids=row.unsqueeze(0).to(self.device), use_cache=False)
            hidden.append(recorders[0].hidden)
        setattr(self.model.get_submodule(where), name, layers)
        return torch.cat(hidden), list(recorders)


    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights in place; they are let go afterwards."""
        layer = self.layers[i]
        self.fill(layer, f"{self.adapter.layer_path}.{i}.")
        try:
            yield layer
        finally:
            layer.to("meta")

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """What follows the last layer: a function (token ids (1, T), last hidden states (1, T, D)) -> logits (1, T, vocabulary)."""
        injected = Injected()
        where, name = self.adapter.layer_path.rsplit(".", 1)
        setattr(self.model.get_submodule(where), name, nn.ModuleList([injected]))
        for prefix, module in [(f"{where}.", self.model.get_submodule(where)), ("lm_head.", self.model.lm_head)]:
            if f"{prefix}weight" in self.checkpoint.tensors or prefix != "lm_head.":
                self.fill(module, prefix)
        if self.model.lm_head.weight.is_meta:
            self.model.lm_head.weight = self.model.get_input_embeddings().weight

        def run(ids: Tensor, hidden: Tensor) -> Tensor:
            injected.hidden = hidden
            return self.model(input_ids=ids, use_cache=False).logits

        try:
            yield run
        finally:
            setattr(self.model.get_submodule(where), name, self.layers)
            self.model.lm_head.to("meta")


class Injected(nn.Module):
    """Stands in for all decoder layers: gives out the hidden states it was handed."""

    hidden: Tensor

    def forward(self, hidden_states, *args, **kwargs):
        return self.hidden


class Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.replaced = (layer,)        # in a tuple: not a submodule
        self.hidden, self.args, self.kwargs = None, (), {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.replaced[0], name)

    def forward(self, hidden_states, *args, **kwargs):
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer as calibration saw it.

    weights: float64. With calibration text also the sums of its metrics, and what its attention module saw and did on each window: inputs and
    heads, lists of (1, T, D) and (1, T, H G d) (the concatenated head outputs, which W_O reads), and the other arguments it was called with.
    Without text these are None or empty.
    """

    index: int
    weights: AttentionWeights
    sums: MetricSums | None
    inputs: list[Tensor]
    heads: list[Tensor]
    arguments: dict


@torch.no_grad()
def calibrated_layers(skeleton: Skeleton, geometry: Geometry, tokens: Tensor | None) -> Iterator[CalibratedLayer]:
    """Each layer in turn; tokens (n, T), or None: weights alone decide."""
    checkpoint, adapter = skeleton.checkpoint, skeleton.adapter
    hidden, calls = skeleton.embed(tokens) if tokens is not None else (None, None)
    for i in range(geometry.layers):
        weights = adapter.split(checkpoint.tensor, i, checkpoint.config).to(skeleton.device, torch.float64)
        if hidden is None:
            yield CalibratedLayer(i, weights, None, [], [], {})
            continue
        sums, inputs, heads, arguments = MetricSums(weights, geometry), [], [], {}

        def see(module, args, kwargs, output):
            arguments.update(kwargs)
            inputs.append(arguments.pop("hidden_states") if "hidden_states" in kwargs else args[0])
            sums.add(inputs[-1], output[1])

        with skeleton.layer(i) as layer:
            attention = layer.get_submodule(adapter.attention)
            hooks = [attention.register_forward_hook(see, with_kwargs=True),
                     attention.get_submodule(adapter.output).register_forward_pre_hook(lambda module, args: heads.append(args[0]))]
            for n in range(len(hidden)):
                output = layer(hidden[n:n + 1], *calls[i].args, **calls[i].kwargs)
                hidden[n:n + 1] = output[0] if isinstance(output, tuple) else output
            for hook in hooks:
                hook.remove()
        yield CalibratedLayer(i, weights, sums, inputs, heads, arguments)
