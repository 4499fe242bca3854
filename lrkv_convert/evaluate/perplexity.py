"""What several models make of the tokens of a text: each one's loss on the next token, and how far
its prediction is from the first model's.

Perplexity = exp(total negative log-likelihood / predicted tokens), in nats, over non-overlapping
windows, no BOS token added, every token of a window but its first predicted. KL(base || other) and
top-1 agreement are means over the same tokens. Logits are taken to float32 first.

The models read every window side by side, so no more than one window's logits of the base are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import LrkvError
from ..modeling.contract_lrkv import CACHE
from .caches import PIECE, new_cache

# tokens per forward pass: longer windows go through the model's cache piece by piece, so that
# logits stay small
LONGEST = 1024
# predictions looked at at once: few enough for the temporaries to stay in the processor's cache
ROWS = 16


@dataclass(frozen=True)
class Candidate:
    """A model, and the quantised cache it reads from (caches.CACHES); None: what attention reads is
    exact.
    """

    model: PreTrainedModel
    cache: str | None = None

    def empty(self, tokens: int) -> Cache | None:
        """What reading windows of so many tokens needs: a cache, or nothing."""
        return new_cache(self.model, self.cache) if self.cache or tokens > LONGEST else None

    def read(self, ids: Tensor, cache: Cache | None, **kwargs) -> Tensor:
        """Logits (N, C, vocabulary) of ids (N, C), which follow what the cache holds; on the
        model's device.
        """
        parts = ids.to(self.model.device).split(
            PIECE if self.cache else max(1, ids.shape[1]), dim=1
        )
        logits = [
            self.model(part, **{CACHE: cache}, use_cache=cache is not None, **kwargs).logits
            for part in parts
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)


@dataclass
class Scores:
    """Of one model, a tensor (T - 1,) per window: nll and KL(base || model) in nats, and whether
    both think the same token likeliest (0 or 1).
    """

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.nll))

    def mean(self, name: str) -> float:
        """Of "nll", "kl" or "agree", over all predicted tokens."""
        return sum(window.double().sum().item() for window in getattr(self, name)) / self.tokens


def text_windows(ids: Tensor, seq_len: int, batch_size: int) -> list[Tensor]:
    """Token ids (n,) -> batches (N, T) of non-overlapping windows, the shorter last one on its own;
    one left-over token is dropped.
    """
    whole = len(ids) // seq_len * seq_len
    batches = list(ids[:whole].view(-1, seq_len).split(batch_size)) if whole else []
    return batches + ([ids[whole:].unsqueeze(0)] if len(ids) - whole > 1 else [])


@torch.no_grad()
def measure(
    candidates: list[Candidate],
    batches: list[Tensor],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Scores]:
    """Scores of every candidate on batches of windows (N, T); the first candidate is the base."""
    scores = [Scores() for _ in candidates]
    for done, ids in enumerate(batches):
        pieces = list(_pieces(candidates, ids))
        for i, score in enumerate(scores):
            for name, columns in zip(("nll", "kl", "agree"), zip(*(piece[i] for piece in pieces))):
                getattr(score, name).extend(torch.cat(columns, dim=1).cpu().unbind())
        progress(done + 1, len(batches))
    return scores


def _pieces(
    candidates: list[Candidate], ids: Tensor
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Windows (N, T) in pieces of LONGEST tokens: for each, (nll, kl, agree) of every candidate,
    (N, C) each.
    """
    N, T = ids.shape
    # a quantised cache may take one scale for all it holds: each window has its own, so that the
    # batch size changes nothing
    caches = [
        [candidate.empty(T) for _ in range(N if candidate.cache else 1)] for candidate in candidates
    ]
    for start in range(0, T - 1, LONGEST):
        targets = ids[:, start + 1 : start + LONGEST + 1]  # (N, C)
        base, found = None, []
        for candidate, held in zip(candidates, caches):
            parts = [
                candidate.read(rows, cache)
                for rows, cache in zip(
                    ids[:, start : start + LONGEST].tensor_split(len(held)), held
                )
            ]
            # (N C, vocabulary)
            logits = (parts[0] if len(parts) == 1 else torch.cat(parts))[
                :, : targets.shape[1]
            ].flatten(0, 1)
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
