"""From scores per token to what a comparison says: perplexity, its ratio to the base's and how sure
that is, and where in a window it is lost.
"""

import math

import torch
from scipy.stats import t as student

from .perplexity import Scores

CONFIDENCE = 0.95
FIRST_BUCKET = 64  # tokens of context; every further bucket is twice as long


def summary(base: Scores, other: Scores) -> dict:
    """Means over all predicted tokens of `other`, beside `base` on the same windows; the base
    itself has no interval.
    """
    nll = other.mean("nll")
    low, high = (
        (None, None)
        if other is base
        else interval(
            [(b - a).double().sum().item() for a, b in zip(base.nll, other.nll)],
            [len(w) for w in base.nll],
        )
    )
    return {
        "tokens": other.tokens,
        "nll": nll,
        "perplexity": math.exp(nll),
        "ratio": math.exp(nll - base.mean("nll")),
        "ratio_low": low,
        "ratio_high": high,
        "kl": other.mean("kl"),
        "top1_agreement": other.mean("agree"),
    }


def joined(scores: list[Scores]) -> Scores:
    """Those of several texts as those of one."""
    every = lambda name: [each for score in scores for each in getattr(score, name)]
    return Scores(every("nll"), every("kl"), every("agree"))


def interval(
    differences: list[float], tokens: list[int]
) -> tuple[float, float] | tuple[None, None]:
    """Confidence interval of a perplexity ratio, from the differences of total loss in each window
    and the windows' tokens.

    ln(ratio) = sum d_i / sum n_i is a ratio of sums over windows, so its standard error is that of
    the ratio estimator (Cochran, Sampling Techniques, ch. 6): sqrt(W / (W - 1) sum (d_i - n_i ln
    ratio)^2) / sum n_i; Student's t with W - 1 degrees of freedom. Both models read the same
    windows: how hard a window is cancels. Windows of one text are alike, so of other texts it says
    less. (None, None) for one window.
    """
    count, total = len(differences), sum(tokens)
    if count < 2:
        return None, None
    mean = sum(differences) / total
    error = (
        math.sqrt(
            count / (count - 1) * sum((d - n * mean) ** 2 for d, n in zip(differences, tokens))
        )
        / total
    )
    reach = student.ppf((1 + CONFIDENCE) / 2, count - 1).item() * error
    return math.exp(mean - reach), math.exp(mean + reach)


def buckets(longest: int) -> list[tuple[int, int]]:
    """Lengths of context [first, last] that are looked at together, up to `longest`: 1 to 63, 64 to
    127, 128 to 255, ...
    """
    firsts = [1]
    while (following := max(FIRST_BUCKET, 2 * firsts[-1])) <= longest:
        firsts.append(following)
    return list(zip(firsts, [first - 1 for first in firsts[1:]] + [longest]))


def by_context(base: Scores, other: Scores) -> list[dict]:
    """`other` beside `base` for predictions from ever more context: does the damage grow with
    distance?
    """
    rows = []
    for first, last in buckets(max(map(len, base.nll))):
        # a window's t-th prediction has t tokens before it
        part = lambda scores, name: torch.cat(
            [w[first - 1 : last] for w in getattr(scores, name)]
        ).double()
        nll, before = part(other, "nll"), part(base, "nll")
        rows.append(
            {
                "from": first,
                "to": last,
                "tokens": len(nll),
                "nll": nll.mean().item(),
                "ratio": (nll.mean() - before.mean()).exp().item(),
                "kl": part(other, "kl").mean().item(),
                "top1_agreement": part(other, "agree").mean().item(),
            }
        )
    return rows
