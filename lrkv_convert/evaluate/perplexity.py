"""What several models make of the same examples: each one's loss on the next token, and how far its
prediction is from the first model's.

Perplexity = exp(total negative log-likelihood / predicted tokens), in nats, over the predictions
that count: in non-overlapping windows of text every token but the first, no BOS token added; of an
encoder-decoder's targets all but the prompt. KL(base || other) and top-1 agreement are means over
the same tokens. Logits are taken to float32 first.

The models read every example side by side, so no more than one batch's logits of the base are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import LrkvError
from ..examples.example import IGNORED, Example, window
from ..examples.writing import encode, heard
from ..modeling.contract_lrkv import CACHE
from .caches import PIECE, new_cache

# tokens per forward pass: longer examples go through the model's cache piece by piece, so that
# logits stay small
LONGEST = 1024
# predictions looked at at once: few enough for the temporaries to stay in the processor's cache
ROWS = 16


class EncoderStates:
    """Last hidden states (1, S, D) of a model's encoder, worked out once for each example. Models
    whose encoders are the same may share them.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.known: dict[int, tuple[Example, Tensor]] = {}  # by identity, which holding it keeps

    def of(self, example: Example) -> Tensor:
        if id(example) not in self.known:
            self.known[id(example)] = example, encode(self.model, example.source)
        return self.known[id(example)][1]


class Candidate:
    """A model, and what it reads from.

    cache: a quantised one (caches.CACHES); None: what attention reads is exact. encoder: states
    that another model with the same encoder has worked out, or works out first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: str | None = None,
        encoder: EncoderStates | None = None,
    ):
        self.model, self.cache = model, cache
        self.encoder = encoder or EncoderStates(model)

    @property
    def ids_name(self) -> str:
        """What the model calls the ids of its decoder."""
        return "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"

    def empty(self, tokens: int, longest: int = LONGEST) -> Cache | None:
        """What reading so many tokens needs, `longest` per forward pass: a cache, or nothing."""
        return new_cache(self.model, self.cache) if self.cache or tokens > longest else None

    def hears(self, example: Example) -> dict:
        """What the decoder is given of the example's source; {} for a decoder on its own."""
        return heard([self.encoder.of(example)]) if example.source else {}

    def read(self, ids: Tensor, cache: Cache | None, **more) -> Tensor:
        """Logits (N, C, vocabulary) of ids (N, C) of the decoder, which follow what the cache
        holds; on the model's device. more: arguments of the model, as those that `hears` gives.
        """
        parts = ids.to(self.model.device).split(
            PIECE if self.cache else max(1, ids.shape[1]), dim=1
        )
        logits = [
            self.model(
                **{self.ids_name: part, CACHE: cache}, use_cache=cache is not None, **more
            ).logits
            for part in parts
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    @torch.no_grad()
    def left_by(self, example: Example) -> Cache:
        """The cache that reading an example leaves: the model's own, or the quantised one."""
        given = self.hears(example) or {"logits_to_keep": 1}
        if (cache := self.empty(0)) is not None:
            self.read(example.ids, cache, **given)
            return cache
        ids = {self.ids_name: example.ids.to(self.model.device)}
        return self.model(**ids, use_cache=True, **given)[CACHE]


@dataclass
class Scores:
    """Of one model, for every example a tensor (n,) over its predictions that count: nll and
    KL(base || model) in nats, and whether both think the same token likeliest (0 or 1).
    """

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.nll))

    def mean(self, name: str) -> float:
        """Of "nll", "kl" or "agree", over all predicted tokens."""
        return sum(each.double().sum().item() for each in getattr(self, name)) / self.tokens


def text_windows(ids: Tensor, seq_len: int) -> list[Example]:
    """Token ids (n,) -> non-overlapping windows, the last one shorter; one left-over token is
    dropped.
    """
    return [window(part) for part in ids.split(seq_len) if len(part) > 1]


def batches_of(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Up to `size` neighbours that are equally long; those with a source each on their own."""
    found: list[list[Example]] = []
    for example in examples:
        alike = (
            found
            and len(found[-1]) < size
            and found[-1][0].tokens == example.tokens
            and not example.source
        )
        if alike:
            found[-1].append(example)
        else:
            found.append([example])
    return found


@torch.no_grad()
def measure(
    candidates: list[Candidate],
    examples: Sequence[Example],
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda *_: None,
    longest: int = LONGEST,
) -> list[Scores]:
    """Scores of every candidate; the first one is the base. batch_size: examples of the same length
    and without a source that are read at once; progress: (examples done, in all); longest: tokens
    per forward pass, beyond which an example goes through the cache. Raises LrkvError where a model
    gives NaN.
    """
    scores, done = [Scores() for _ in candidates], 0
    for batch in batches_of(examples, batch_size):
        pieces = list(_pieces(candidates, batch, longest))
        for i, score in enumerate(scores):
            for name, columns in zip(("nll", "kl", "agree"), zip(*(piece[i] for piece in pieces))):
                for example, row in zip(batch, torch.cat(columns, dim=1).cpu()):
                    counts = example.predicts[: len(row)] != IGNORED
                    getattr(score, name).append(row[counts])
        progress(done := done + len(batch), len(examples))
    return scores


def _pieces(
    candidates: list[Candidate], batch: list[Example], longest: int
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """A batch in pieces of `longest` tokens, as far as predictions count: for each piece, (nll, kl,
    agree) of every candidate, (N, C) each, which say nothing where a prediction does not count.
    """
    ids = torch.cat([example.ids for example in batch])  # (N, T)
    predicts = torch.stack([example.predicts for example in batch])  # (N, T)
    N, T = ids.shape
    # a quantised cache may take one scale for all it holds: each example has its own, so that the
    # batch size changes nothing
    caches = [
        [candidate.empty(T, longest) for _ in range(N if candidate.cache else 1)]
        for candidate in candidates
    ]
    for start in range(0, T, longest):
        if not (predicts[:, start:] != IGNORED).any():
            break
        targets = predicts[:, start : start + longest].clamp_min(0)  # (N, C)
        base, found = None, []
        for candidate, held in zip(candidates, caches):
            more = candidate.hears(batch[0])  # an example with a source is alone
            parts = [
                candidate.read(rows, cache, **more)
                for rows, cache in zip(
                    ids[:, start : start + longest].tensor_split(len(held)), held
                )
            ]
            # (N C, vocabulary)
            logits = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)
            nll, mass, top = prediction(logits, targets.flatten().to(logits.device))
            if nll.isnan().any():
                raise LrkvError(
                    f"{candidate.model.name_or_path or 'the model'} gives NaN on this text",
                    "its weights are damaged, or too large for this dtype: try --dtype float32",
                )
            base = base or (logits, mass, top)
            kl = torch.zeros_like(nll) if base[0] is logits else divergence(*base[:2], logits, mass)
            found.append(
                tuple(
                    t.view(targets.shape)
                    for t in (nll, kl, (top == base[2].to(top.device)).float())
                )
            )
        yield found


def prediction(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (n, vocabulary): loss on the targets (n,), log of the normalising sum (n,),
    likeliest token (n,).
    """
    mass, top = torch.empty(len(logits), device=logits.device), torch.empty_like(targets)
    for rows, part, most in zip(logits.split(ROWS), mass.split(ROWS), top.split(ROWS)):
        rows = rows.float()
        largest, most[:] = rows.max(-1)
        part[:] = (rows - largest.unsqueeze(-1)).exp_().sum(-1).log_() + largest
    return mass - logits.gather(1, targets.unsqueeze(1)).squeeze(1).float(), mass, top


def divergence(base: Tensor, base_mass: Tensor, other: Tensor, mass: Tensor) -> Tensor:
    """KL(base || other) (n,) of logits (n, vocabulary) whose normalising sums are known: sum p (z -
    z') + log Z' - log Z.
    """
    base_mass, kl = base_mass.to(mass.device), torch.empty_like(mass)
    for rows, others, part, own in zip(
        base.split(ROWS), other.split(ROWS), kl.split(ROWS), base_mass.split(ROWS)
    ):
        rows = rows.to(others.device, torch.float32)
        part[:] = ((rows - own.unsqueeze(-1)).exp_() * (rows - others.float())).sum(-1)
    return kl + mass - base_mass
