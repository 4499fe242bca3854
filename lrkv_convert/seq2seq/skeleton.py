"""The original encoder-decoder on the meta device, filled a part at a time: one layer of either
stack is in memory, and what is around the layers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..families import EncoderDecoder
from ..modeling import auto_class
from ..source import Checkpoint
from ..source.skeleton import filled, first_of, plainly, replaced


class StackSkeleton:
    """The model without weights; buffers are real. Attention of the decoder runs eagerly, because
    the metrics need its weights.

    tied: names of tensors that are others under a second name, and those; a pair that differs in
    the checkpoint is not tied, as transformers has it.
    """

    def __init__(self, checkpoint: Checkpoint, family: EncoderDecoder, device: torch.device):
        self.checkpoint, self.family, self.device = checkpoint, family, device
        with init_empty_weights(include_buffers=False):
            self.model = auto_class(family.any.model_type).from_config(
                copy.deepcopy(checkpoint.config), attn_implementation="eager", dtype=torch.float32
            )
        plainly(self.model).eval().requires_grad_(False)
        self.tied = {
            name: source
            for name, source in self.model.all_tied_weights_keys.items()
            if self._same(name, source)
        }
        self.decoder = self.model.get_submodule(family.decoder)

    def _same(self, name: str, source: str) -> bool:
        """Whether `name` is tied to `source`, or, where that is not there, to the first of those
        tied to it that is: what transformers then takes for all.
        """
        alike = [
            source,
            *(other for other, same in self.model.all_tied_weights_keys.items() if same == source),
        ]
        first = next((found for found in alike if found in self.checkpoint.tensors), name)
        if name == first or name not in self.checkpoint.tensors:
            return True
        return self.checkpoint.shape_dtype(name) == self.checkpoint.shape_dtype(
            first
        ) and torch.equal(self.checkpoint.tensor(name), self.checkpoint.tensor(first))

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
        return (
            self.checkpoint.tensor(self.stored_as(name))
            if self._held(name)
            else self._owner(name).create_weight()
        )

    def _held(self, name: str) -> bool:
        return self.stored_as(name) in self.checkpoint.tensors or not hasattr(
            self._owner(name), "create_weight"
        )

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def names(self, state: dict) -> list[str]:
        """Which tensors of a model of this family are written: tied ones once, and none that
        transformers leaves out because its class makes the same.
        """
        left_out = [
            name
            for name in self.model._keys_to_ignore_on_save or []
            if not self._own_positions(name)
        ]
        return [name for name in state if name not in self.tied and name not in left_out]

    def _own_positions(self, name: str) -> bool:
        """Whether the checkpoint holds other positions than the class makes: transformers reads
        them.
        """
        return name in self.checkpoint.tensors and not torch.equal(
            self.checkpoint.tensor(name).float(), self._owner(name).create_weight().float()
        )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes the checkpoint must have. Buffers may be missing: they are then what the
        class makes them.
        """
        state, buffers = self.model.state_dict(), dict(self.model.named_buffers())
        return {
            self.stored_as(name): tuple(state[name].shape)
            for name in self.names(state)
            if self._held(name) and (name not in buffers or name in self.checkpoint.tensors)
        }

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Put float32 weights into a module on the device."""
        module.load_state_dict(
            {
                name: self.tensor(prefix + name).to(self.device, torch.float32)
                for name, _ in module.named_parameters()
            },
            strict=False,
            assign=True,
        )
        module.to(self.device)

    @contextmanager
    def layer(self, stack: str, i: int) -> Iterator[nn.Module]:
        """One layer of a stack with its weights in place; they are let go afterwards."""
        path = f"{stack}.{self.family.layers}.{i}"
        layer = self.model.get_submodule(path)
        with filled(self.fill, {path: layer}):
            yield layer

    @contextmanager
    def around(
        self, stack: str, stand_in: nn.Module, embeddings: bool = True
    ) -> Iterator[nn.Module]:
        """A stack with everything but its layers in place, `stand_in` where they were, and without
        its embeddings if so asked.
        """
        module = self.model.get_submodule(stack)
        left_out = (self.family.layers, *([] if embeddings else ["embed_tokens"]))
        with (
            replaced(module, self.family.layers, nn.ModuleList([stand_in])),
            filled(
                self.fill,
                {
                    f"{stack}.{name}": child
                    for name, child in module.named_children()
                    if name not in left_out
                },
            ),
        ):
            yield module

    def hands_on(self, stack: str, longest: int) -> Callable[[int], dict]:
        """What the layers of a stack are handed beside hidden states and mask, by length: the
        relative position bias, which the first one makes.
        """
        if not self.family.relative:
            return lambda length: {}
        path = f"{stack}.{self.family.layers}.0.layer.0.SelfAttention"
        attention = self.model.get_submodule(path)
        with filled(
            self.fill, {f"{path}.relative_attention_bias": attention.relative_attention_bias}
        ):
            # (1, H, longest, longest): of differences of positions
            bias = attention.compute_bias(longest, longest, device=self.device)
        return lambda length: {"position_bias": bias[:, :, :length, :length]}

    @torch.no_grad()
    def encode(self, sources: list[Tensor]) -> list[Tensor]:
        """Last hidden states (1, S, D) of the encoder for every source, layer after layer."""
        stack, said = self.family.encoder, "input_features" if self.family.speech else "input_ids"
        noted = Noted(self.family.relative)
        with self.around(stack, noted) as encoder:
            hidden = [noted.of(encoder, **{said: source.to(self.device)}) for source in sources]
        more = self.hands_on(stack, max(h.shape[1] for h in hidden))
        encoder = self.model.get_submodule(stack)
        with _attending(encoder.config, "sdpa"):  # nobody looks at its weights
            for i in range(len(getattr(encoder, self.family.layers))):
                with self.layer(stack, i) as layer:
                    hidden = [
                        first_of(layer(h, attention_mask=None, **more(h.shape[1]))) for h in hidden
                    ]
        with self.around(stack, noted) as encoder:
            for n, source in enumerate(sources):
                noted.instead = hidden[n]
                hidden[n] = first_of(encoder(**{said: source.to(self.device)}).last_hidden_state)
        return hidden

    @torch.no_grad()
    def embed(self, targets: list[Tensor]) -> list[Tensor]:
        """What enters the decoder's first layer (1, T, D) for ids (T,)."""
        noted = Noted(self.family.relative)
        with self.around(self.family.decoder, noted) as decoder:
            return [
                noted.of(decoder, input_ids=ids.unsqueeze(0).to(self.device), use_cache=False)
                for ids in targets
            ]

    def causal_mask(self, length: int) -> Tensor:
        """What the decoder's layers add to their scores, (1, 1, T, T)."""
        return torch.full(
            (1, 1, length, length), torch.finfo(torch.float32).min, device=self.device
        ).triu(1)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """What follows the last layer: a function from last hidden states (1, T, D) and the
        encoder's states to logits (1, T, vocabulary).
        """
        noted, head = Noted(self.family.relative), self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        bias = "final_logits_bias" if "final_logits_bias" in self.checkpoint.tensors else None

        def run(hidden: Tensor, states: Tensor) -> Tensor:
            noted.instead = hidden
            return self.model(
                encoder_outputs=(states,), decoder_inputs_embeds=hidden, use_cache=False
            ).logits

        with (
            self.around(self.family.decoder, noted, embeddings=False),
            filled(self.fill, {name: head}),
        ):
            if bias:
                self.model.final_logits_bias = self.checkpoint.tensor(bias).to(
                    self.device, torch.float32
                )
            yield run


@contextmanager
def _attending(config, implementation: str) -> Iterator[None]:
    """The attention function of this config, for a while."""
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield
    finally:
        config._attn_implementation = before


class Noted(nn.Module):
    """Stands in for all layers of a stack: notes the hidden states that come and passes them on, or
    gives out others instead.

    threefold: layers of this family give hidden states and two position biases.
    """

    def __init__(self, threefold: bool):
        super().__init__()
        self.threefold, self.hidden, self.instead = threefold, None, None

    def of(self, stack: nn.Module, **arguments) -> Tensor:
        """The hidden states that would enter the first layer."""
        self.instead = None
        stack(**arguments)
        return self.hidden

    def forward(self, hidden_states, *args, **kwargs):
        self.hidden = hidden_states if self.instead is None else self.instead
        return (self.hidden, None, None) if self.threefold else self.hidden
