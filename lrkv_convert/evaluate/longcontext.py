"""Does what was compressed reach across a long context? A number to be found again at several
depths, and the loss by position.

The passkey task is that of Landmark Attention (Mohtashami and Jaggi 2023, arXiv 2305.16300): a
number hidden in a text that says nothing, asked for at its end. A model that cannot do it
uncompressed says nothing about compression, so the original's own result stands beside the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .caches import new_cache
from .perplexity import LONGEST, Candidate

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I"
    " will quiz you about the important information there."
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
KEY = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def prompt(
    tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float, key: int
) -> tuple[Tensor, Tensor]:
    """(ids (T,) of at most `tokens` tokens, or the `shortest`, with the key at `depth` of the
    filler; ids of the answer).
    """
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    introduction, filler, hidden, question = (
        tokenizer(INTRODUCTION)["input_ids"],
        plain(FILLER),
        plain(KEY.format(key=key)),
        plain(QUESTION),
    )
    # as it is cut after the question: alone it may begin otherwise
    answer = plain(f"{QUESTION} {key}")[len(question) :]
    if introduction and introduction[-1] == tokenizer.eos_token_id:
        introduction = introduction[:-1]
    repeats = max(
        0, (tokens - len(introduction) - len(hidden) - len(question) - len(answer)) // len(filler)
    )
    before = round(depth * repeats)
    return torch.tensor(
        introduction + before * filler + hidden + (repeats - before) * filler + question
    ), torch.tensor(answer)


def shortest(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the task without any filler."""
    return sum(map(len, prompt(tokenizer, 0, 0.0, 10000)))


@torch.no_grad()
def recall(
    candidate: Candidate, ids: Tensor, answer: Tensor, longest: int = LONGEST
) -> tuple[bool, float]:
    """Whether greedy decoding after ids (T,) gives the answer (k,), and the answer's mean negative
    log-likelihood in nats.

    The answer's tokens are read in one go: if each is the likeliest after the ones before it,
    greedy decoding would have written them. longest: tokens per forward pass.
    """
    cache = new_cache(candidate.model, candidate.cache)
    for part in ids[:-1].unsqueeze(0).split(longest, dim=1):
        candidate.read(part, cache, logits_to_keep=1)
    last = torch.cat([ids[-1:], answer[:-1]]).unsqueeze(0)
    # (k, vocabulary)
    logits = candidate.read(last, cache)[0].float()
    answer = answer.to(logits.device)
    return (
        bool((logits.argmax(-1) == answer).all()),
        torch.nn.functional.cross_entropy(logits, answer).item(),
    )


def passkeys(
    candidates: list[Candidate],
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    progress: Callable[[int, int], None] = lambda *_: None,
    seed: int = 0,
) -> list[list[dict]]:
    """For every candidate, [{"tokens": asked for, "depths": [{"depth", "found", "nll"}, ...]},
    ...]. All are asked for the same numbers.
    """
    found, generator = [[] for _ in candidates], torch.Generator().manual_seed(seed)
    for i, length in enumerate(lengths):
        for rows in found:
            rows.append({"tokens": length, "depths": []})
        for j, depth in enumerate(DEPTHS):
            ids, answer = prompt(
                tokenizer,
                length,
                depth,
                int(torch.randint(10000, 100000, (1,), generator=generator)),
            )
            for candidate, rows in zip(candidates, found):
                right, nll = recall(candidate, ids, answer)
                rows[-1]["depths"].append({"depth": depth, "found": right, "nll": nll})
            progress(i * len(DEPTHS) + j + 1, len(lengths) * len(DEPTHS))
    return found
