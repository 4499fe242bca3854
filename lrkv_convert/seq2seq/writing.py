"""What a model writes by itself, greedily: the target where nobody has given one, and what is compared word by word."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin, PreTrainedModel

from .reader import Reader

TEXT, SPEECH = 128, 224     # most tokens written; the latter is half of what Whisper's decoder holds, as in its own code
AT_ONCE = 8                 # sources


@torch.no_grad()
def write(model: PreTrainedModel, reader: Reader, sources: list[Tensor], prompts: list[list[int]], progress: Callable[[int, int], None] = lambda *_: None) -> list[Tensor]:
    """For every source the sequence (T + 1,) of the decoder, greedily: the prompt, what it writes, the end (missing where it stops at the limit).

    Not `model.generate` of speech models, which cuts prompts and times away and goes over long recordings: that of all models.
    """
    limit = min(SPEECH if reader.family.speech else TEXT, reader.longest_target - max(map(len, prompts)))
    order, found = sorted(range(len(sources)), key=lambda n: sources[n].shape[-1]), {}          # alike lengths together
    for begin in range(0, len(order), AT_ONCE):
        rows = order[begin:begin + AT_ONCE]
        given = torch.tensor([prompts[n] for n in rows], device=model.device)
        result = GenerationMixin.generate(model, **inputs(model, reader, [sources[n] for n in rows]), decoder_input_ids=given, max_new_tokens=limit, min_length=0,
                                          do_sample=False, num_beams=1)
        for n, row in zip(rows, result.cpu()):
            ends = torch.isin(row[given.shape[1]:], torch.tensor(reader.ends)).nonzero()
            found[n] = row[:given.shape[1] + int(ends[0]) + 1] if len(ends) else row
        progress(len(found), len(sources))
    return [found[n] for n in range(len(sources))]


def inputs(model: PreTrainedModel, reader: Reader, sources: list[Tensor]) -> dict[str, Tensor]:
    """Sources as one batch of the model's arguments: features, or ids padded on the right with their mask."""
    if reader.family.speech:
        return {"input_features": torch.cat(sources).to(model.device, model.dtype)}
    ids = pad_sequence([source[0] for source in sources], batch_first=True, padding_value=model.config.pad_token_id or 0)
    mask = pad_sequence([torch.ones_like(source[0]) for source in sources], batch_first=True)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
