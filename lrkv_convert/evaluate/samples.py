"""What models write, side by side."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..modeling.contract_lrkv import CACHE
from .perplexity import Candidate

PROMPT, WRITTEN = 32, 32  # tokens


@torch.no_grad()
def continuation(
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = WRITTEN,
) -> str:
    """Greedy continuation of a prompt, without the prompt."""
    model: Any = candidate.model
    written = tokenizer(prompt)["input_ids"]
    inputs = torch.tensor(
        [written[:-1] if len(written) > 1 and written[-1] == tokenizer.eos_token_id else written],
        device=model.device,
    )
    ids = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **({CACHE: candidate.empty(0)} if candidate.cache else {}),
    )
    return cast(str, tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True))


def passages(ids: Tensor, count: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Beginnings for models to go on from: `count` places of a text (n,), spread evenly."""
    starts = torch.linspace(0, max(0, len(ids) - PROMPT), count + 2)[1:-1].long().tolist()
    return [
        cast(str, tokenizer.decode(ids[start : start + PROMPT], skip_special_tokens=True))
        for start in starts
    ]
