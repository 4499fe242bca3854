"""The original model on the meta device, filled a part at a time: memory holds one layer, or what
is around the layers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..device import give_back_memory
from ..errors import LrkvError, first_line
from ..families import Adapter
from . import Checkpoint


class Skeleton:
    """The original model on the meta device, filled a part at a time from its checkpoint. Buffers
    (RoPE frequencies) are real.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, device: torch.device):
        self.checkpoint, self.adapter, self.device = checkpoint, adapter, device
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(checkpoint.config),
                    attn_implementation="eager",
                    dtype=torch.float32,
                )
        # tables of as many positions as the config says
        except (RuntimeError, MemoryError) as error:
            raise LrkvError(
                f"no model can be built from the config of {checkpoint.source}:"
                f" {first_line(error)}",
                "is config.json that of these weights?",
            ) from error
        plainly(self.model).eval().requires_grad_(False)
        self.layers = self.model.get_submodule(adapter.layer_path)
        for name, buffer in self.model.named_buffers():
            if name.endswith("inv_freq") and not torch.isfinite(buffer).all():
                raise LrkvError(
                    f"the config of {checkpoint.source} gives frequencies of RoPE that are no"
                    " numbers",
                    "see rope_theta and what scales it in config.json",
                )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes the checkpoint must have; tied tensors stand once."""
        tied = (
            set(self.model._tied_weights_keys or {})
            if self.checkpoint.config.tie_word_embeddings
            else set()
        )
        return {
            name: tuple(p.shape)
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if name not in tied
        }

    def fill(self, module: nn.Module, prefix: str, left_out: tuple[str, ...] = ()) -> None:
        """Put float32 weights into a module on the device."""
        names = [name for name, _ in module.named_parameters() if name not in left_out]
        module.load_state_dict(
            {
                name: self.checkpoint.tensor(f"{prefix}{name}").to(self.device, torch.float32)
                for name in names
            },
            strict=False,
            assign=True,
        )
        if not left_out:
            module.to(self.device)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list["Recorder"]]:
        """Everything before the first layer: tokens (n, T) -> hidden states (n, T, D), and what
        else each layer is called with.
        """
        recorders, hidden = (
            nn.ModuleList(Recorder(layer, self.adapter.legacy) for layer in self.layers),
            [],
        )
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
        base = self.model.get_submodule(self.adapter.prefix.rstrip("."))
        with (
            replaced(self.model.get_submodule(where), name, stand_in),
            filled(
                self.fill,
                {
                    f"{self.adapter.prefix}{n}": child
                    for n, child in base.named_children()
                    if child not in (stand_in, *left_out)
                },
            ),
        ):
            yield base

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights in place; they are let go afterwards."""
        with filled(self.fill, {f"{self.adapter.layer_path}.{i}": self.layers[i]}):
            yield self.layers[i]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What follows the last layer: a function from last hidden states (1, T, D) to logits (1,
        T, vocabulary).
        """
        injected, head, embeddings = (
            Injected(self.adapter.legacy),
            self.model.get_output_embeddings(),
            self.model.get_input_embeddings(),
        )
        # lm_head, or embed_out
        name = next(name for name, module in self.model.named_modules() if module is head)
        own = f"{name}.weight" in self.checkpoint.tensors

        def run(hidden: Tensor) -> Tensor:
            injected.hidden = hidden
            # OPT may embed in another width; nobody reads it
            instead = hidden.new_zeros(*hidden.shape[:2], embeddings.embedding_dim)
            return self.model(inputs_embeds=instead, use_cache=False).logits

        with self._around_layers(nn.ModuleList([injected]), *([embeddings] if own else [])):
            self.fill(head, f"{name}.", () if own else ("weight",))
            if not own:
                head.weight = embeddings.weight
            yield run
            empty(head)


def plainly(model: PreTrainedModel) -> PreTrainedModel:
    """The model, giving out what is read here and no more, whatever its config has it give: old
    configs ask for tuples, or for the attention of all layers.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.return_dict = True
            for field in ("output_attentions", "output_hidden_states", "output_router_logits"):
                if getattr(part.config, field, False):
                    setattr(part.config, field, False)
    return model


@contextmanager
def filled(fill: Callable[[nn.Module, str], None], parts: dict[str, nn.Module]) -> Iterator[None]:
    """These parts of a model, by their paths, with their weights in place; they are let go
    afterwards. fill: `Skeleton.fill`.
    """
    try:
        for path, part in parts.items():
            fill(part, f"{path}.")
        yield
    finally:
        for part in parts.values():
            empty(part)
        give_back_memory()


@contextmanager
def replaced(parent: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    """Another module under this name, for a while."""
    before = getattr(parent, name)
    setattr(parent, name, stand_in)
    try:
        yield
    finally:
        setattr(parent, name, before)


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
    """Stands in for a decoder layer: notes what it is called with and passes the hidden states
    on.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool):
        super().__init__()
        self.in_tuple = in_tuple
        self.replaced = (layer,)  # in a tuple: not a submodule
        self.hidden, self.args, self.kwargs = None, (), {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.replaced[0], name)

    def forward(self, hidden_states, *args, **kwargs):
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return (hidden_states,) if self.in_tuple else hidden_states
