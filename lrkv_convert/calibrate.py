"""Text -> what the fit must know of each layer, one layer at a time.

The original model is built on the meta device and its layers are filled in turn, so memory holds one layer, the hidden states of the
calibration windows and one layer's sums; what the layers gave lies in a Store. Attention runs eagerly, because the metrics need its weights.
"""
import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .adapters import Adapter, AttentionWeights, Geometry
from .checkpoint import Checkpoint
from .device import give_back_memory
from .errors import LrkvError
from .metrics import HeadMoments, LayerMetrics, MetricSums
from .store import Store

SEQ_LEN = 512
BUILT_IN = "built-in"
SELF = "self"       # as a calibration text: what the model itself writes
SAMPLED_AT_ONCE = 16
AT_ONCE = 4         # windows given to the refit
KEPT_AS = torch.bfloat16    # activations that wait on disk for the refit: they are the bulk of what a conversion stores


@dataclass(frozen=True)
class Text:
    """A named text. `sha256` is of its UTF-8 bytes; max_tokens: no more than its first so many are meant."""

    name: str
    content: str
    max_tokens: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(paths: list[str]) -> list[Text]:
    """Texts from files and folders (every *.txt and *.md inside), and BUILT_IN for the text that ships with this package. Raises LrkvError."""
    texts = []
    for path in map(Path, paths):
        if str(path) == BUILT_IN:
            texts.append(Text(BUILT_IN, resources.files("lrkv_convert").joinpath("data/calibration.txt").read_text(encoding="utf-8")))
            continue
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
        if not files:
            raise LrkvError(f"{path} holds no .txt or .md file", "give text files, or a folder of them")
        for file in files:
            if file.suffix in (".json", ".jsonl"):
                raise LrkvError(f"{file} is JSON, not text", "write what is to be read into a .txt file")
            try:
                texts.append(Text(file.name, file.read_text(encoding="utf-8")))
            except OSError as error:
                raise LrkvError(f"cannot read the text {file}: {error.strerror}", "check the path") from error
            except UnicodeDecodeError as error:
                raise LrkvError(f"{file} is not UTF-8 text", "convert it, or give another text") from error
    return texts


def sample_text(model: PreTrainedModel, tokenizer, tokens: int, seed: int = 0) -> Text:
    """About `tokens` tokens sampled from the model at temperature 1, in documents of one window, each begun anew from the BOS token."""
    length, starts = window_length(model.config), getattr(model.generation_config, "bos_token_id", None)
    starts = tokenizer.eos_token_id if starts is None else starts
    rows, documents = [], tokens // length + 2          # decoding and tokenising again may lose a few tokens
    model.generation_config = GenerationConfig()        # its own may bend the distribution
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for n in range(0, documents, SAMPLED_AT_ONCE):
            count = min(SAMPLED_AT_ONCE, documents - n)
            first = torch.randint(len(tokenizer), (count, 1)) if starts is None else torch.full((count, 1), starts)
            rows.extend(model.generate(first.to(model.device), attention_mask=torch.ones_like(first).to(model.device), do_sample=True, temperature=1.0, top_k=0,
                                       top_p=1.0, max_new_tokens=length - 1, eos_token_id=None, pad_token_id=0))
    return Text(SELF, "\n\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows))


def window_length(config) -> int:
    """Tokens per calibration window: SEQ_LEN, or what the model can read."""
    return min(SEQ_LEN, getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or SEQ_LEN)


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

    def fill(self, module: nn.Module, prefix: str, left_out: tuple[str, ...] = ()) -> None:
        """Put float32 weights into a module on the device."""
        names = [name for name, _ in module.named_parameters() if name not in left_out]
        module.load_state_dict({name: self.checkpoint.tensor(f"{prefix}{name}").to(self.device, torch.float32) for name in names}, strict=False, assign=True)
        if not left_out:
            module.to(self.device)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list["Recorder"]]:
        """Everything before the first layer: tokens (n, T) -> hidden states (n, T, D), and what else each layer is called with."""
        recorders, hidden = nn.ModuleList(Recorder(layer, self.adapter.legacy) for layer in self.layers), []
        with self._around_layers(recorders) as base:
            for row in tokens:
                base(input_ids=row.unsqueeze(0).to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden)
        for recorder in recorders:
            recorder.kwargs = self.adapter.layer_arguments(recorder.kwargs)
        return torch.cat(hidden), list(recorders)

    @contextmanager
    def _around_layers(self, stand_in: nn.ModuleList, *left_out: nn.Module) -> Iterator[nn.Module]:
        """The base model with everything but its layers in place, `stand_in` where they were."""
        where, name = self.adapter.layer_path.rsplit(".", 1)
        parent, base = self.model.get_submodule(where), self.model.get_submodule(self.adapter.prefix.rstrip("."))
        setattr(parent, name, stand_in)
        around = [(f"{self.adapter.prefix}{n}.", child) for n, child in base.named_children() if child not in (stand_in, *left_out)]
        try:
            for prefix, child in around:
                self.fill(child, prefix)
            yield base
        finally:
            setattr(parent, name, self.layers)
            for _, child in around:
                empty(child)

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights in place; they are let go afterwards."""
        layer = self.layers[i]
        self.fill(layer, f"{self.adapter.layer_path}.{i}.")
        try:
            yield layer
        finally:
            empty(layer)
            give_back_memory()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What follows the last layer: a function from last hidden states (1, T, D) to logits (1, T, vocabulary)."""
        injected, head, embeddings = Injected(self.adapter.legacy), self.model.get_output_embeddings(), self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)      # lm_head, or embed_out
        own = f"{name}.weight" in self.checkpoint.tensors

        def run(hidden: Tensor) -> Tensor:
            injected.hidden = hidden
            instead = hidden.new_zeros(*hidden.shape[:2], embeddings.embedding_dim)      # OPT may embed in another width; nobody reads it
            return self.model(inputs_embeds=instead, use_cache=False).logits

        with self._around_layers(nn.ModuleList([injected]), *([embeddings] if own else [])):
            self.fill(head, f"{name}.", () if own else ("weight",))
            if not own:
                head.weight = embeddings.weight
            yield run
            empty(head)


def empty(module: nn.Module) -> None:
    """Let a module's weights go; its buffers (RoPE frequencies) stay."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def first_of(output):
    """The hidden states a decoder layer gives, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Injected(nn.Module):
    """Stands in for all decoder layers: gives out the hidden states it was handed."""

    hidden: Tensor

    def __init__(self, in_tuple: bool):
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden_states, *args, **kwargs):
        return (self.hidden,) if self.in_tuple else self.hidden


class Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module, in_tuple: bool):
        super().__init__()
        self.in_tuple = in_tuple
        self.replaced = (layer,)        # in a tuple: not a submodule
        self.hidden, self.args, self.kwargs = None, (), {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.replaced[0], name)

    def forward(self, hidden_states, *args, **kwargs):
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return (hidden_states,) if self.in_tuple else hidden_states


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer as calibration saw it.

    weights: as stored in the checkpoint; rest: the other tensors of its attention module, norms and the like. With calibration text also the sums of its metrics (`MetricSums.state()`), and what its attention
    module saw and did on each window: inputs and heads, bfloat16, lists of (1, T, D) and (1, T, H G d) (the concatenated head outputs, which
    W_O reads), and the other arguments it was called with; moments where gradients were taken. Without text these are None or empty.
    """

    index: int
    weights: AttentionWeights
    rest: dict[str, Tensor] = field(default_factory=dict)
    sums: dict | None = None
    inputs: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)
    moments: HeadMoments | None = None

    def calls(self, device: torch.device) -> Iterator[tuple[Tensor, dict, Tensor]]:
        """What the attention module was called with and did, some windows at a time, float32: inputs (n, T, D), its other arguments, heads (n, T, H G d)."""
        for start in range(0, len(self.inputs), AT_ONCE):
            x, heads = (torch.cat(windows[start:start + AT_ONCE]).to(device, torch.float32) for windows in (self.inputs, self.heads))
            yield x, self.arguments, heads

    def metrics(self, geometry: Geometry, name: str) -> LayerMetrics:
        """The metrics called `name` (metrics.METRICS)."""
        return LayerMetrics(self.weights, geometry, name, self.sums, self.moments)


@torch.no_grad()
def calibrate(skeleton: Skeleton, geometry: Geometry, tokens: Tensor, wanted: Collection[str], store: Store, keep: Tensor | None = None,
              activations: bool = True, progress: Callable[[int, int], None] = lambda *_: None) -> None:
    """Run every layer on all windows (n, T) and save what `calibrated_layer` reads, for the metrics called `wanted`.

    keep: indices of windows whose hidden states before each layer are saved too, as "entering-i", and after the last as "entering-L". activations:
    whether inputs and heads are saved, which only the refit reads.
    """
    if f"entering-{geometry.layers}" in store:
        return
    checkpoint, adapter, device = skeleton.checkpoint, skeleton.adapter, skeleton.device
    hidden, calls = skeleton.embed(tokens)
    begin = 0
    if "forward" in store:
        state = store.load("forward")
        begin, hidden = state["next"], state.pop("hidden").clone().to(device)
    for i in range(begin, geometry.layers):
        sums, inputs, heads, arguments = MetricSums(adapter.split(checkpoint.tensor, i, checkpoint.config), geometry, wanted, device), [], [], {}
        entering = None if keep is None else hidden[keep]

        def see(module, args, kwargs, output):
            arguments.update(kwargs)
            x = arguments.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if activations:
                inputs.append(x.to(KEPT_AS))
            sums.add(x[0], output[1][0])

        with skeleton.layer(i) as layer:
            attention = layer.get_submodule(adapter.attention)
            hooks = [attention.register_forward_hook(see, with_kwargs=True),
                     attention.get_submodule(adapter.output).register_forward_pre_hook(lambda module, args: heads.append(args[0].to(KEPT_AS)) if activations else None)]
            for n in range(len(hidden)):
                hidden[n:n + 1] = first_of(layer(hidden[n:n + 1], *calls[i].args, **calls[i].kwargs))
            for hook in hooks:
                hook.remove()
        if entering is not None:
            store.save(f"entering-{i}", entering)
        store.save(f"layer-{i}", {"sums": sums.state(), "inputs": inputs, "heads": heads, "arguments": arguments})
        store.save("forward", {"next": i + 1, "hidden": hidden})
        progress(i + 1, geometry.layers)
    store.save(f"entering-{geometry.layers}", hidden[:0] if keep is None else hidden[keep])
    store.remove("forward")


def calibrated_layer(skeleton: Skeleton, store: Store, i: int) -> CalibratedLayer:
    """Layer i as far as the store knows it: weights alone where there was no text."""
    checkpoint, device = skeleton.checkpoint, skeleton.device
    there = lambda value: value.to(device) if isinstance(value, Tensor) else value
    weights = skeleton.adapter.split(checkpoint.tensor, i, checkpoint.config).to(device)
    rest = {name: there(tensor) for name, tensor in skeleton.adapter.rest(checkpoint, i).items()}
    if f"layer-{i}" not in store:
        return CalibratedLayer(i, weights, rest)
    seen = store.load(f"layer-{i}")
    moments = HeadMoments(*map(there, store.load(f"moments-{i}"))) if f"moments-{i}" in store else None
    arguments = {name: tuple(map(there, value)) if isinstance(value, tuple) else there(value) for name, value in seen["arguments"].items()}
    return CalibratedLayer(i, weights, rest, {name: there(value) for name, value in seen["sums"].items()}, seen["inputs"], seen["heads"], arguments, moments)
