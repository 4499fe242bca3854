"""What a few bits a latent cost, and what a fit needs for latents to become codes
(modeling/codes_lrkv.py).

The cache as a transform code: W_h ~ W_shared C_h takes inputs to latents z of which each is worth
its own number of bits, none at all included, which is what rank is. With noise of variance D(b) on
latents of variance 1, the loss grows by (errors of latents add, to second order)

    gain_i (D^2 + share_i (D - D^2))        gain_i = sum_h | row i of C_h M_h^(1/2) |^2
    gain_i                                  where latent i is dropped: D(0) = 1

The part D^2 is lost signal; the rest is noise of its own at each token. A key meets its noise whole
(share 1); of values attention takes means over tokens, in which noise fades and signal does not:
share_i weighs heads by sum_s a_ts^2.

Latents are those of a joint fit (fit/bases.py) without residuals, in the covariance of usual
tokens: about their mean, and without the first of each text, which attention uses as sinks and
which have a centre of their own.

Shapes: H heads, D width, d head width, m latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..modeling.codes_lrkv import REACH, Blocks

if TYPE_CHECKING:
    from .metric import Metric

# bits -> D(b): squared error of a latent of variance 1, of a scale a token as codes_lrkv.py has it.
# Set by hand: normal latents have .84 to 1.05 times that at 2 to 4 bits, .3 to .8 at 6 and 8, and
# tests/test_codes.py holds them near it
DISTORTION = {8: 1e-4, 6: 1e-3, 4: 0.0125, 3: 0.04, 2: 0.14}
WIDTHS = tuple(DISTORTION)
NOTHING = 1e-7  # size of a latent, relative to the largest, below which it is rounding
# latents of a width are planned in multiples of this: sizes that a kernel likes
PLANNED_MULTIPLE = 8
LAMBDAS = 96  # trade-offs of loss against bits that a curve tries


@dataclass(frozen=True)
class Spread:
    """How the inputs of one attention module lie, float64: mean (D,) and covariance (D, D) of usual
    tokens, mean of first ones (D,), and shares (H,): E sum_s a_ts^2 of attention to usual tokens,
    over the queries of each KV head.
    """

    mean: Tensor
    first: Tensor
    covariance: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Coding:
    """One way of coding the latents of a side: how many have how many bits, and the loss."""

    blocks: Blocks
    loss: float

    @property
    def width(self) -> int:
        return sum(count for _, count in self.blocks)


def losses(gains: Tensor, shares: Tensor, widths: Sequence[int]) -> Tensor:
    """Loss of each latent (1 + widths, m): dropped, then with so many bits. gains, shares (m,)."""
    D = torch.tensor([DISTORTION[b] for b in widths], dtype=gains.dtype, device=gains.device)
    D = D.unsqueeze(1)
    return torch.cat((gains.unsqueeze(0), gains * (D**2 + shares * (D - D**2))))


def codings(gains: Tensor, shares: Tensor, widths: Sequence[int] = WIDTHS) -> list[Coding]:
    """The best codings of latents by what a bit is worth, few bits first (reverse water-filling,
    with the widths there are). gains, shares (m,), in descending order of gains.
    """
    widths = sorted(widths, reverse=True)
    table = losses(gains, shares, widths)  # (1 + widths, m)
    bits = torch.tensor([0.0, *widths], dtype=gains.dtype, device=gains.device).unsqueeze(1)
    top = gains.max().clamp_min(torch.finfo(gains.dtype).tiny).log2().item()
    # also where no latent is worth a bit, such as in layers without weights
    least: Blocks = ((widths[-1], PLANNED_MULTIPLE),)
    tried: dict[Blocks, Coding] = {least: Coding(least, loss_of(table, widths, least))}
    for step in range(LAMBDAS):
        price = 2.0 ** (top + 1 - step / 3)  # loss a bit
        chosen = (table + price * bits).argmin(0)  # (m,): 0 dropped, then by widths
        # how many latents have at least each width; more bits never come after fewer
        ends = [
            rounded(int(((chosen > 0) & (chosen <= k)).sum()), len(gains))
            for k in range(1, len(widths) + 1)
        ]
        counts = [b - a for a, b in zip([0, *ends], ends)]
        blocks = tuple((w, n) for w, n in zip(widths, counts) if n)
        if blocks and blocks not in tried:
            tried[blocks] = Coding(blocks, loss_of(table, widths, blocks))
    return list(tried.values())


def rounded(count: int, latents: int) -> int:
    """The nearest number that packs, up where there is a choice of none."""
    if not count:
        return 0
    most = -(-latents // PLANNED_MULTIPLE) * PLANNED_MULTIPLE
    return min(most, max(PLANNED_MULTIPLE, round(count / PLANNED_MULTIPLE) * PLANNED_MULTIPLE))


def loss_of(table: Tensor, widths: Sequence[int], blocks: Blocks) -> float:
    """Loss of latents in this order. table: `losses`."""
    total, first = 0.0, 0
    for bits, count in blocks:
        total += table[1 + widths.index(bits), first : first + count].sum().item()
        first += count
    return total + table[0, first:].sum().item()


def levels(blocks: Blocks, like: Tensor) -> tuple[Tensor, Tensor]:
    """Distortion D and reach A of each latent in order of the blocks, (m,) each."""
    each = lambda table: torch.tensor(
        [table[bits] for bits, count in blocks for _ in range(count)], dtype=like.dtype
    ).to(like.device)
    return each(DISTORTION), each(REACH)


@dataclass(frozen=True)
class Normalised:
    """Latents of G groups of h heads, made ready to become codes: weights (G, D, w), maps
    (G, h, w, d), centres (2, G, w), and the loss expected of their rounding.
    """

    weights: Tensor
    maps: Tensor
    centres: Tensor
    loss: float

    @property
    def heads(self) -> Tensor:
        """What the centres stand for, (2, H, d)."""
        return torch.einsum("cgw,ghwd->cghd", self.centres, self.maps).flatten(1, 2)


def normalised(weights: Tensor, maps: Tensor, blocks: Blocks, metric: "Metric") -> Normalised:
    """Latents in the order of what they are worth, each divided by its size. weights, maps: as in
    `Normalised`; metric: with a spread and shares. Sizes are those in its Sigma, which is shrunk:
    directions that calibration never saw must not reach beyond all codes.
    """
    G, h, w, d = maps.shape
    spread, roots = metric.spread, metric.M.root.view(G, h, d, d)
    assert spread is not None and metric.shares is not None
    shares = metric.shares.view(G, h, 1)
    variance = (weights * (metric.sigma @ weights)).sum(1).clamp_min(0)  # (G, w)
    of_heads = (maps @ roots).square().sum(-1) * variance.unsqueeze(1)  # (G, h, w)
    order = of_heads.sum(1).argsort(dim=-1, descending=True, stable=True)  # (G, w)
    every = order.unsqueeze(1)
    weights = weights.gather(2, every.expand(G, weights.shape[1], w))
    maps = maps.gather(2, every.unsqueeze(-1).expand(G, h, w, d))
    of_heads, variance = of_heads.gather(2, every.expand(G, h, w)), variance.gather(1, order)
    D, reach = levels(blocks, variance)
    size = variance.sqrt()
    # latents that are nothing, such as those beyond the rank of W, stay so
    size = torch.where(size > NOTHING * size.amax(), size, torch.ones_like(size)) * reach
    weights, maps = weights / size.unsqueeze(1), maps * size[:, None, :, None]
    centres = torch.stack((spread.mean, spread.first)) @ weights  # (G, 2, w)
    # as any dtype of a checkpoint keeps them
    centres = centres.to(torch.bfloat16).to(centres.dtype).transpose(0, 1)
    noise = (of_heads * (D**2 + shares * (D - D**2))).sum().item()
    return Normalised(weights, maps, centres, noise)


def coded(
    W: Tensor,
    bias: Tensor | None,
    slots: dict[str, tuple[Tensor, Tensor]],
    codes: dict[str, Blocks],
    metric: "Metric",
) -> tuple[dict[str, Normalised], Tensor, dict[str, Tensor], float]:
    """Latents as codes: those of each slot, the bias (H, d) of the side, the lift (H, d) of sinks
    by slot, and the loss expected.

    W (H, D, d), bias (H, d): what is to be cached; slots: weights and maps of "base" and
    "residual", as in `Normalised`; codes: of the same; metric: with a spread and shares.
    """
    spread = metric.spread
    assert spread is not None
    ready = {name: normalised(*slot, codes[name], metric) for name, slot in slots.items()}
    # heads of a usual token and of a first one (2, H, d), and what of them no latent has
    rest = torch.einsum("cD,hDd->chd", torch.stack((spread.mean, spread.first)), W.double())
    for slot in ready.values():
        means = torch.stack((spread.mean, spread.first)) @ slot.weights  # (G, 2, w)
        rest = rest - torch.einsum("gcw,ghwd->cghd", means, slot.maps).flatten(1, 2)
    usual = rest[0] + sum(slot.heads[0] for slot in ready.values())
    lifts = {name: slot.heads[1] - slot.heads[0] for name, slot in ready.items()}
    lifts[next(iter(lifts))] += rest[1] - rest[0]
    bias = usual if bias is None else usual + bias.double()
    return ready, bias, lifts, sum(slot.loss for slot in ready.values())
