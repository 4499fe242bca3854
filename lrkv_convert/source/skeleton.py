"""The original model on the meta device, filled a part at a time: memory holds one layer, or what
is around the layers.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import give_back_memory
from ..errors import LrkvError, first_line
from ..examples.example import Example
from ..families import Encoder, Family
from ..modeling import auto_class
from .checkpoint import Checkpoint

# (layer, length, states of the encoder or None) -> what a layer is called with beside its hidden
# states: positional and keyword arguments
Call = Callable[[int, int, Tensor | None], tuple[tuple, dict]]
# (last hidden states (1, T, D), states of the encoder or None) -> logits (1, T, vocabulary)
Head = Callable[[Tensor, Tensor | None], Tensor]


# (length, states of the encoder or None) -> what an attention module is called with
Arguments = Callable[[int, Tensor | None], dict]


class Skeleton(ABC):
    """The model without weights; buffers (RoPE frequencies) are real. Attention runs eagerly,
    because the metrics need its weights. What differs with and without an encoder is told by
    `DecoderSkeleton` and `EncoderDecoderSkeleton` (`skeleton_of`).

    layers: of the decoder; tied: names of tensors that are others under a second name, and those; a
    pair that differs in the checkpoint is not tied, as transformers has it.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, device: torch.device):
        self.checkpoint, self.family, self.device = checkpoint, family, device
        auto = auto_class(family.model_type)
        try:
            with init_empty_weights(include_buffers=False):
                self.model: PreTrainedModel = auto.from_config(
                    copy.deepcopy(checkpoint.config),
                    attn_implementation="eager",
                    dtype=torch.float32,
                )
        except (RuntimeError, MemoryError) as error:  # tables of as many positions as it says
            raise LrkvError(
                f"no model can be built from the config of {checkpoint.source}:"
                f" {first_line(error)}",
                "is config.json that of these weights?",
            ) from error
        plainly(self.model).eval().requires_grad_(False)
        self.tied = {
            name: source
            for name, source in self.model.all_tied_weights_keys.items()
            if self._same(name, source)
        }
        self.layers = cast(nn.ModuleList, self.model.get_submodule(family.any.layer_path))
        for name, buffer in self.model.named_buffers():
            if name.endswith("inv_freq") and not torch.isfinite(buffer).all():
                raise LrkvError(
                    f"the config of {checkpoint.source} gives frequencies of RoPE that are no"
                    " numbers",
                    "see rope_theta and what scales it in config.json",
                )

    # ---------------------------------------------------------------------------------- tensors

    def _same(self, name: str, source: str) -> bool:
        """Whether `name` is tied to `source`, or, where that is not there, to the first of those
        tied to it that is: what transformers then takes for all.
        """
        held = self.checkpoint
        alike = [
            source,
            *(o for o, same in self.model.all_tied_weights_keys.items() if same == source),
        ]
        first = next((found for found in alike if found in held.tensors), name)
        if name == first or name not in held.tensors:
            return True
        return held.shape_dtype(name) == held.shape_dtype(first) and torch.equal(
            held.tensor(name), held.tensor(first)
        )

    def stored_as(self, name: str) -> str:
        """The name under which the checkpoint has a tensor: its own, or that of one it is tied
        to.
        """
        source = self.tied.get(name, name)
        alike = [source, *(other for other, same in self.tied.items() if same == source)]
        return next((found for found in alike if found in self.checkpoint.tensors), source)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint, or of sinusoidal positions, which not every checkpoint holds,
        what the class makes.
        """
        if self._held(name):
            return self.checkpoint.tensor(self.stored_as(name))
        return self._owner(name).create_weight()

    def _held(self, name: str) -> bool:
        return self.stored_as(name) in self.checkpoint.tensors or not hasattr(
            self._owner(name), "create_weight"
        )

    def _owner(self, name: str) -> Any:
        return self.model.get_submodule(name.rpartition(".")[0])

    def names(self, model: PreTrainedModel) -> list[str]:
        """Which tensors of a model of this family are written: tied ones once, none that
        transformers leaves out because its class makes the same, and of buffers those that the
        checkpoint holds.
        """
        ignored = self.model._keys_to_ignore_on_save or []
        left_out = [name for name in ignored if self._computed(name)]
        buffers = dict(model.named_buffers())
        return [
            name
            for name in model.state_dict()
            if name not in self.tied
            and name not in left_out
            and (name not in buffers or name in self.checkpoint.tensors)
        ]

    def _computed(self, name: str) -> bool:
        """Whether the class makes this tensor, and the checkpoint holds no other in its place,
        which transformers would read.
        """
        owner, held = self._owner(name), self.checkpoint
        return hasattr(owner, "create_weight") and (
            name not in held.tensors
            or torch.equal(held.tensor(name).float(), owner.create_weight().float())
        )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes the checkpoint must have. Buffers may be missing: they are then what the
        class makes them.
        """
        state = self.model.state_dict()
        return {
            self.stored_as(name): tuple(state[name].shape)
            for name in self.names(self.model)
            if self._held(name)
        }

    # ------------------------------------------------------------------------- a part at a time

    def fill(self, module: nn.Module, prefix: str, left_out: tuple[str, ...] = ()) -> None:
        """Put float32 weights into a module on the device."""
        names = [name for name, _ in module.named_parameters() if name not in left_out]
        module.load_state_dict(
            {name: self.tensor(f"{prefix}{name}").to(self.device, torch.float32) for name in names},
            strict=False,
            assign=True,
        )
        if not left_out:
            module.to(self.device)

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """One layer of the decoder with its weights in place; they are let go afterwards."""
        with filled(self.fill, {f"{self.family.any.layer_path}.{i}": self.layers[i]}):
            yield self.layers[i]

    def encode(self, examples: Sequence[Example]) -> list[Tensor] | None:
        """Last hidden states (1, S, D) of the encoder for every example; None without one."""
        return None

    @abstractmethod
    def embed(self, examples: Sequence[Example]) -> tuple[list[Tensor], Call]:
        """Everything before the decoder's first layer: hidden states (1, T, D) of every example,
        and what else each layer is called with.
        """

    @abstractmethod
    def attention_arguments(self, kind: str, recorded: dict, longest: int) -> Arguments:
        """What a converted attention module is called with beside its input. recorded: what the
        original's was, with the last example; longest: tokens of an example at most.
        """

    @abstractmethod
    def head(self) -> AbstractContextManager[Head]:
        """What follows the decoder's last layer."""


class DecoderSkeleton(Skeleton):
    """Of a decoder on its own."""

    @torch.no_grad()
    def embed(self, examples):
        tuples, recorded, hidden = self.family.any.tuples, {}, []
        recorders: Any = nn.ModuleList(Recorder(layer, tuples) for layer in self.layers)
        with self._around_layers(recorders) as base:
            for example in examples:
                base(input_ids=example.ids.to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden)
                if example.tokens not in recorded:
                    recorded[example.tokens] = [
                        (r.args, self.family.any.layer_arguments(r.kwargs)) for r in recorders
                    ]
        return hidden, lambda i, length, states=None: recorded[length][i]

    def attention_arguments(self, kind, recorded, longest):
        return lambda length, states: recorded

    @contextmanager
    def _around_layers(self, stand_in: nn.ModuleList, *left_out: nn.Module) -> Iterator[nn.Module]:
        """The base model with everything but its layers in place, `stand_in` where they were."""
        where, name = self.family.any.layer_path.rsplit(".", 1)
        prefix = self.family.any.prefix
        base = self.model.get_submodule(prefix.rstrip("."))
        with replaced(self.model.get_submodule(where), name, stand_in):
            parts = {
                f"{prefix}{n}": child
                for n, child in base.named_children()
                if child not in (stand_in, *left_out)
            }
            with filled(self.fill, parts):
                yield base

    @contextmanager
    def head(self):
        injected = Injected(self.family.any.tuples)
        head: Any = self.model.get_output_embeddings()
        embeddings: Any = self.model.get_input_embeddings()
        # lm_head, or embed_out
        name = next(name for name, module in self.model.named_modules() if module is head)
        own = f"{name}.weight" in self.checkpoint.tensors

        def run(hidden: Tensor, states: Tensor | None = None) -> Tensor:
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


class EncoderDecoderSkeleton(Skeleton):
    """Of an encoder-decoder: one layer of either stack is in memory, and what is around them."""

    @property
    def encoder(self) -> Encoder:
        """Where its stacks lie."""
        assert self.family.encoder is not None
        return self.family.encoder

    @contextmanager
    def _encoder_layer(self, i: int) -> Iterator[nn.Module]:
        path = f"{self.encoder.path}.{self.encoder.layers}.{i}"
        layer = self.model.get_submodule(path)
        with filled(self.fill, {path: layer}):
            yield layer

    @contextmanager
    def _around(
        self, stack: str, stand_in: nn.Module, embeddings: bool = True
    ) -> Iterator[nn.Module]:
        """A stack with everything but its layers in place, `stand_in` where they were, and without
        its embeddings if so asked.
        """
        module, layers = self.model.get_submodule(stack), self.encoder.layers
        left_out = (layers, *([] if embeddings else ["embed_tokens"]))
        with replaced(module, layers, nn.ModuleList([stand_in])):
            parts = {
                f"{stack}.{name}": child
                for name, child in module.named_children()
                if name not in left_out
            }
            with filled(self.fill, parts):
                yield module

    def _hands_on(self, stack: str, longest: int) -> Callable[[int], dict]:
        """What the layers of a stack are handed beside hidden states and mask, by length: the
        relative position bias, which the first one makes.
        """
        if not self.encoder.relative:
            return lambda length: {}
        path = f"{stack}.{self.encoder.layers}.0.layer.0.SelfAttention"
        attention: Any = self.model.get_submodule(path)
        with filled(
            self.fill, {f"{path}.relative_attention_bias": attention.relative_attention_bias}
        ):  # (1, H, longest, longest): of differences of positions
            bias = attention.compute_bias(longest, longest, device=self.device)
        return lambda length: {"position_bias": bias[:, :, :length, :length]}

    def _causal_mask(self, length: int) -> Tensor:
        """What the decoder's layers add to their scores, (1, 1, T, T)."""
        low = torch.finfo(torch.float32).min
        return torch.full((1, 1, length, length), low, device=self.device).triu(1)

    @torch.no_grad()
    def encode(self, examples):
        stack, noted = self.encoder.path, Noted(self.encoder.relative)
        sources = [
            {name: tensor.to(self.device) for name, tensor in example.source.items()}
            for example in examples
        ]
        with self._around(stack, noted) as encoder:
            hidden = [noted.of(encoder, **source) for source in sources]
        more = self._hands_on(stack, max(h.shape[1] for h in hidden))
        encoder = self.model.get_submodule(stack)
        with _attending(encoder.config, "sdpa"):  # nobody looks at its weights
            for i in range(len(getattr(encoder, self.encoder.layers))):
                with self._encoder_layer(i) as layer:
                    hidden = [
                        first_of(layer(h, attention_mask=None, **more(h.shape[1]))) for h in hidden
                    ]
        with self._around(stack, noted) as encoder:
            for n, source in enumerate(sources):
                noted.instead = hidden[n]
                hidden[n] = first_of(encoder(**source).last_hidden_state)
        return hidden

    @torch.no_grad()
    def embed(self, examples):
        stack, noted = self.encoder.decoder, Noted(self.encoder.relative)
        with self._around(stack, noted) as decoder:
            hidden = [
                noted.of(decoder, input_ids=example.ids.to(self.device), use_cache=False)
                for example in examples
            ]
        more = self._hands_on(stack, max(example.tokens for example in examples))

        def call(i: int, length: int, states: Tensor | None) -> tuple[tuple, dict]:
            return (), {
                "attention_mask": self._causal_mask(length),
                "encoder_hidden_states": states,
                **more(length),
            }

        return hidden, call

    def attention_arguments(self, kind, recorded, longest):
        if kind == "cross":
            return lambda length, states: {"key_value_states": states}
        more, mask = self._hands_on(self.encoder.decoder, longest), self.encoder.mask
        return lambda length, states: {mask: self._causal_mask(length), **more(length)}

    @contextmanager
    def head(self):
        noted = Noted(self.encoder.relative)
        head: Any = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        bias = "final_logits_bias" if "final_logits_bias" in self.checkpoint.tensors else None

        def run(hidden: Tensor, states: Tensor | None = None) -> Tensor:
            noted.instead = hidden
            return self.model(
                encoder_outputs=(states,), decoder_inputs_embeds=hidden, use_cache=False
            ).logits

        with (
            self._around(self.encoder.decoder, noted, embeddings=False),
            filled(self.fill, {name: head}),
        ):
            if bias:
                held = self.checkpoint.tensor(bias).to(self.device, torch.float32)
                self.model.final_logits_bias = held
            yield run


def skeleton_of(checkpoint: Checkpoint, family: Family, device: torch.device) -> Skeleton:
    """The skeleton of a checkpoint whose tensors are placed (source/names.py). Raises LrkvError."""
    kind = DecoderSkeleton if family.encoder is None else EncoderDecoderSkeleton
    return kind(checkpoint, family, device)


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


@contextmanager
def _attending(config, implementation: str) -> Iterator[None]:
    """The attention function of this config, for a while."""
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield
    finally:
        config._attn_implementation = before


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


class Noted(nn.Module):
    """Stands in for all layers of a stack: notes the hidden states that come and passes them on, or
    gives out others instead.

    threefold: layers of this family give hidden states and two position biases.
    """

    hidden: Tensor | None
    instead: Tensor | None

    def __init__(self, threefold: bool):
        super().__init__()
        self.threefold, self.hidden, self.instead = threefold, None, None

    def of(self, stack: nn.Module, **arguments) -> Tensor:
        """The hidden states that would enter the first layer."""
        self.instead = None
        stack(**arguments)
        assert self.hidden is not None, "the stack called no layer"
        return self.hidden

    def forward(self, hidden_states, *args, **kwargs):
        self.hidden = hidden_states if self.instead is None else self.instead
        return (self.hidden, None, None) if self.threefold else self.hidden
