"""What a model writes by itself, greedily: the target where nobody has given one, and what is
compared word by word.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..modeling.contract_lrkv import CACHE
from .reader import Reader

# most tokens written; the latter is half of what Whisper's decoder holds, as in its own code
TEXT, SPEECH = 128, 224
AT_ONCE = 8  # sources


@torch.no_grad()
def encode(model: PreTrainedModel, source: dict[str, Tensor]) -> Tensor:
    """The encoder's last hidden states (1, S, D) of a source (`Example.source`)."""
    given = {
        name: t.to(model.device, model.dtype if t.is_floating_point() else t.dtype)
        for name, t in source.items()
    }
    return model.get_encoder()(**given).last_hidden_state


@torch.no_grad()
def write(
    model: PreTrainedModel,
    reader: Reader,
    states: list[Tensor],
    prompts: list[list[int]],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Tensor]:
    """For every source the sequence (T + 1,) of the decoder, greedily: the prompt, what it writes,
    the end (missing where it stops at the limit). states: of all sources, as `encode` gives them.

    Not `model.generate` of speech models, which cuts prompts and times away and goes over long
    recordings: that of all models.
    """
    limit = min(
        SPEECH if reader.family.speech else TEXT, reader.longest_target - max(map(len, prompts))
    )
    # alike lengths together
    order, found = sorted(range(len(states)), key=lambda n: states[n].shape[1]), {}
    for begin in range(0, len(order), AT_ONCE):
        rows = order[begin : begin + AT_ONCE]
        given = torch.tensor([prompts[n] for n in rows], device=model.device)
        # its `self` is annotated as a whole model, which the class alone is not
        result = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
            model,
            **heard([states[n] for n in rows]),
            decoder_input_ids=given,
            max_new_tokens=limit,
            min_length=0,
            do_sample=False,
            # of as many layers as it takes
            num_beams=1,
            **{CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
        )
        for n, row in zip(rows, result.cpu()):
            ends = torch.isin(row[given.shape[1] :], torch.tensor(reader.ends)).nonzero()
            found[n] = row[: given.shape[1] + int(ends[0]) + 1] if len(ends) else row
        progress(len(found), len(states))
    return [found[n] for n in range(len(states))]


def heard(states: list[Tensor]) -> dict:
    """States (1, S, D) of several sources as one batch of a model's arguments, padded on the right,
    with their mask.
    """
    mask = pad_sequence(
        [torch.ones(state.shape[1], dtype=torch.long, device=state.device) for state in states],
        batch_first=True,
    )
    return {
        "encoder_outputs": BaseModelOutput(
            last_hidden_state=pad_sequence([state[0] for state in states], batch_first=True)
        ),
        "attention_mask": mask,
    }
