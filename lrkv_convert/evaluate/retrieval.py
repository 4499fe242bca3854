"""Is what lies far back still found? Retrieval tasks (examples/retrieval.py), each told by how many
answers are found and by the loss of the answers, which moves long before they are lost.

A model that cannot do a task uncompressed says nothing about compression, so the original's own
result stands beside the others.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from scipy.stats import binomtest
from transformers import PreTrainedTokenizerBase

from ..examples.retrieval import HAYSTACKS, TASKS, Hidden, texts
from .caches import new_cache
from .perplexity import LONGEST, Candidate
from .statistics import CONFIDENCE


@torch.no_grad()
def answers(
    candidate: Candidate, hidden: Hidden, longest: int = LONGEST
) -> list[tuple[bool, float]]:
    """Of each question: whether greedy decoding gives the answer, and the answer's mean negative
    log-likelihood in nats.

    The text is read once, `longest` tokens at a time, and each question goes on from a copy of its
    cache. An answer's tokens are read in one go: if each is the likeliest after the ones before it,
    greedy decoding would have written them.
    """
    cache = new_cache(candidate.model, candidate.cache)
    for part in hidden.text.unsqueeze(0).split(longest, dim=1):
        candidate.read(part, cache, logits_to_keep=1)
    found = []
    for asked in hidden.asked:
        own = copy.deepcopy(cache) if len(hidden.asked) > 1 else cache
        ids = torch.cat((asked.question, asked.answer[:-1])).unsqueeze(0)
        logits = candidate.read(ids, own, logits_to_keep=len(asked.answer))[0].float()
        logits = logits[-len(asked.answer) :]
        answer = asked.answer.to(logits.device)
        right = bool((logits.argmax(-1) == answer).all())
        found.append((right, torch.nn.functional.cross_entropy(logits, answer).item()))
    return found


def retrieval(
    candidates: list[Candidate],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    prose: str,
    samples: int,
    progress: Callable[[int, int], None] = lambda *_: None,
    seed: int = 0,
) -> list[list[dict]]:
    """For every candidate a row for each task, haystack and length: how many answers were asked for
    and found, with an interval (Wilson 1927), their mean loss in nats, and the same by depth. All
    are asked the same.
    """
    cases = [
        (task, hay, tokens)
        for tokens in lengths
        for hay in HAYSTACKS
        for task in TASKS
        if (task, hay) != ("copy", "filler")  # of which the passage would be one of many
    ]
    rows: list[list[dict]] = [[] for _ in candidates]
    for done, (task, hay, tokens) in enumerate(cases):
        made = list(
            texts(tokenizer, task, prose if hay == "prose" else None, tokens, samples, seed)
        )
        depths = [asked.depth for hidden in made for asked in hidden.asked]
        for i, candidate in enumerate(candidates):
            found = [each for hidden in made for each in answers(candidate, hidden)]
            rows[i].append(
                {"task": task, "haystack": hay, "tokens": tokens, **_told(found, depths)}
            )
            progress(done * len(candidates) + i + 1, len(cases) * len(candidates))
    return rows


def _told(found: list[tuple[bool, float]], depths: list[float | None]) -> dict:
    right = sum(each for each, _ in found)
    interval = binomtest(right, len(found)).proportion_ci(CONFIDENCE, method="wilson")
    mean = lambda values: sum(values) / len(values)
    return {
        "asked": len(found),
        "found": right,
        "found_low": float(interval.low),
        "found_high": float(interval.high),
        "nll": mean([nll for _, nll in found]),
        "depths": [
            {
                "depth": depth,
                "asked": len(own := [each for each, at in zip(found, depths) if at == depth]),
                "found": sum(each for each, _ in own),
                "nll": mean([nll for _, nll in own]),
            }
            for depth in sorted({at for at in depths if at is not None})
        ],
    }
