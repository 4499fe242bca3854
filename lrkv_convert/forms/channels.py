"""Keys in their own channels, before rotation, as codes: nothing is rebuilt when they are read. A
channel is dequantised, turned with its partner and met by the query of its own head, so reading
costs little more than reading keys as they are.

RoPE turns channel pair (i, i + n / 2) of a head as one complex number, so it commutes with a
rotation of the pair that is the same for all tokens, which W_Q absorbs. With S the covariance of
the pair and G its metric (2 x 2 each), the angle is chosen at which

    gain_1 gain_2 = (S_11 G_11) (S_22 G_22)

is least, which is what bits are paid for. Channels that do not turn may be mixed at will, and are:
they are the principal axes of their head.

Each channel has bits of its own, none included: a dropped one keeps its mean. Those of a token are
one row of codes for all heads, most bits first.

Shapes: H heads, D width, d head width, m channels kept, n of a head's channels turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.codes import NOTHING, Spread, codings, levels, loss_of, losses
from ..fit.metric import Metric, square_root
from ..modeling.codes_lrkv import MULTIPLES, Blocks
from .base import Asked, Fitted, Form, Shape, query_heads

ANGLES = 64  # tried at once for a pair, in a quarter of a turn: the other three swap its channels


class Channels(Form):
    name = runtime = "channels"
    says = "keys in their own channels, before rotation, as codes: nothing to rebuild"
    sized = coded = coded_only = True
    rebuilds = False

    def check(self, geometries, base, config):
        """Layers without RoPE may stand between others."""
        geometries = list(geometries)
        if not any(geometry.rotary for geometry in geometries):
            raise LrkvError(
                f"--keys {self.name} needs RoPE, and this model has none",
                "its keys are cheap to read as they are: leave --keys out",
            )
        super().check(geometries, base, config)

    def check_geometry(self, geometry, base, config):
        if geometry.key_norm:
            raise LrkvError(
                f"--keys {self.name} needs keys without a norm: how channels lie after it, the"
                " covariance of inputs does not say",
                "choose another form of keys",
            )

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        """All channels unless a width is given."""
        refuse_residuals(self.name, asked)
        whole = geometry.kv_heads * geometry.head_dim
        return Shape(whole if asked.width is None else asked.width, 0, self.name)

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        """None of 16-bit numbers: `coded_curve` has those that there are."""
        return []

    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        """Raises ValueError: there are no 16-bit numbers to lose anything by."""
        raise ValueError(f"--keys {self.name} goes with codes only")

    def work(self, shape: Shape, geometry: Geometry) -> int:
        """Two to turn a channel, and one for each query that meets it."""
        turned = 2 * geometry.kv_heads * geometry.rotary_dim
        return turned + query_heads(geometry) * geometry.head_dim

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        return 2 + geometry.groups

    def coded_curve(
        self,
        W: Tensor,
        metric: Metric,
        widths: Sequence[int],
        geometry: Geometry,
        groups: int = 1,
    ) -> list[tuple[Shape, float]]:
        gains = worth(*turned_axes(W, metric, geometry)[:2], metric).flatten()
        return coded_shapes(gains, widths, self.name)

    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        """The true head is What_h gauge_h, and W_Q absorbs gauge_h."""
        assert metric.spread is not None and shape.codes[0] is not None
        W, gauge, inverse = turned_axes(W, metric, geometry)
        gains = worth(W, gauge, metric)
        kept = kept_channels(W.transpose(0, 1), gains, shape.codes[0], metric.spread)
        heads = means_of(metric.spread) @ W + kept.beyond.transpose(0, 1)  # (H, 2, d)
        usual, first = heads[:, 0], heads[:, 1]
        own = 0 if bias is None else (bias.double().unsqueeze(1) @ inverse).squeeze(1)
        return Fitted(kept.tensors(usual + own, first - usual), kept.error, gauge, kept.found)


@dataclass(frozen=True)
class Kept:
    """Channels of a grid (H, d) made ready to become codes, those of most bits first.

    weights (D, m), each divided by its size; sizes (m,); centres (2, m); beyond (2, H, d): what the
    grid of a usual token and of a first one has more, by rounding, than inputs give; bits: of each
    channel, a string of digits for each row of the grid; error: expected of their rounding and of
    those dropped, relative.
    """

    weights: Tensor
    sizes: Tensor
    centres: Tensor
    beyond: Tensor
    bits: list[str]
    error: float

    @property
    def found(self) -> dict:
        return {"bits": self.bits}

    def tensors(self, bias: Tensor, lift: Tensor) -> dict[str, Tensor]:
        """Of the module in the converted model; bias, lift (H, d)."""
        return {
            "W_shared.weight": self.weights.T,
            "C": self.sizes,
            "bias": bias,
            "base_codes.centres": self.centres.unsqueeze(1),
            "base_codes.lift": lift,
        }


def kept_channels(
    columns: Tensor, gains: Tensor, blocks: Blocks, spread: Spread, turn: bool = False
) -> Kept:
    """Give the channels of a grid their bits by what they are worth. columns (D, H, d), gains
    (H, d); turn: whether they are to turn in pairs (i, i + d / 2) before they become codes, so that
    both are worth the same, and have the same bits and the same size.
    """
    H, d = gains.shape
    order = gains.flatten().argsort(descending=True, stable=True)
    if turn:
        pairs = gains[:, : d // 2].flatten().argsort(descending=True, stable=True)
        real = pairs // (d // 2) * d + pairs % (d // 2)
        order = torch.stack((real, real + d // 2), dim=-1).flatten()
    bits = torch.zeros(H * d, dtype=torch.long)
    m = sum(count for _, count in blocks)
    bits[order[:m].cpu()] = torch.tensor([width for width, count in blocks for _ in range(count)])
    # those of a width as they lie in the grid, so that reading goes through it in order
    places = bits.argsort(descending=True, stable=True)[:m].to(columns.device)
    columns = columns.flatten(1)
    variance = (columns * (spread.covariance @ columns)).sum(0).view(H, d)
    if turn:
        variance = variance.unflatten(1, (2, -1)).mean(1).repeat(1, 2)
    columns, size = columns[:, places], variance.flatten()[places].clamp_min(0).sqrt()
    # channels that are nothing stay so
    size = torch.where(size > NOTHING * size.max(), size, torch.ones_like(size))
    # as any dtype of a checkpoint keeps them, here and below
    size = rounded(size * levels(blocks, size)[1])
    weights = columns / size
    means = means_of(spread) @ weights  # (2, m)
    centres = rounded(means)
    beyond = torch.zeros(2, H * d, dtype=size.dtype, device=size.device)
    beyond[:, places] = (centres - means) * size
    widths = sorted({width for width, _ in blocks}, reverse=True)
    # as it was planned, by order of gains
    table = losses(gains.flatten()[order], torch.ones_like(gains.flatten()), widths)
    total = gains.sum().item()
    digits = "".join(map(str, bits.tolist()))
    return Kept(
        weights,
        size,
        centres,
        beyond.view(2, H, d),
        [digits[h * d : (h + 1) * d] for h in range(H)],
        (loss_of(table, widths, blocks) / total) ** 0.5 if total > 0 else 0.0,
    )


def coded_shapes(gains: Tensor, widths: Sequence[int], form: str) -> list[tuple[Shape, float]]:
    """Shapes of channels worth this much (n,), and their losses."""
    gains = gains.sort(descending=True).values
    return [
        (Shape(sum(count for _, count in blocks), 0, form, (blocks, None)), found.loss)
        for found in codings(gains, torch.ones_like(gains), widths)
        if (blocks := at_most(found.blocks, len(gains)))
    ]


def at_most(blocks: Blocks, n: int) -> Blocks | None:
    """The same for n latents where rounding asked for some more: fewer of the fewest bits; None
    where those do not pack.
    """
    (bits, count), excess = blocks[-1], sum(count for _, count in blocks) - n
    if excess <= 0:
        return blocks
    left = count - excess
    return (*blocks[:-1], (bits, left)) if left > 0 and left % MULTIPLES[bits] == 0 else None


def worth(W: Tensor, gauge: Tensor, metric: Metric) -> Tensor:
    """What each channel of W (H, D, d) is worth, (H, d): its variance times its metric, where the
    true head is W_h gauge_h (H, d, d).
    """
    assert metric.spread is not None
    variance = (W * (metric.spread.covariance @ W)).sum(1).clamp_min(0)
    return variance * (gauge @ metric.M.root).square().sum(-1)


def turned_axes(W: Tensor, metric: Metric, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """W (H, D, d) in axes that suit codes and commute with RoPE, the gauge that takes those back,
    and its inverse, (H, d, d) each.
    """
    assert metric.spread is not None
    W, n = W.double(), geometry.rotary_dim
    M = metric.M.root @ metric.M.root
    S = W.mT @ (metric.spread.covariance @ W)  # (H, d, d)
    gauge, inverse = torch.zeros_like(M), torch.zeros_like(M)
    if n:
        left, right = slice(0, n // 2), slice(n // 2, n)
        pair = lambda t: tuple(
            t[:, a, b].diagonal(dim1=-2, dim2=-1)
            for a, b in ((left, left), (left, right), (right, right))
        )
        angle = quietest_angle(pair(S), pair(M))  # (H, n / 2)
        cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
        # row vectors [left | right] turned by minus the angle
        turn = torch.cat((torch.cat((cos, -sin), -1), torch.cat((sin, cos), -1)), -2)
        inverse[:, :n, :n], gauge[:, :n, :n] = turn, turn.mT
    if n < geometry.head_dim:
        root = square_root(M[:, n:, n:])
        vectors = torch.linalg.eigh(root.root @ S[:, n:, n:] @ root.root).eigenvectors
        inverse[:, n:, n:], gauge[:, n:, n:] = root.root @ vectors, vectors.mT @ root.inverse
    return W @ inverse, gauge, inverse


def quietest_angle(S: Sequence[Tensor], G: Sequence[Tensor]) -> Tensor:
    """The angle by which to turn complex numbers back so that their real and imaginary parts are
    worth the least product. S, G: covariance and metric of [real, imaginary], the elements 11, 12
    and 22 of a 2 x 2 matrix, of any shape.
    """
    S, G = ([t.unsqueeze(-1) for t in each] for each in (S, G))
    tried = torch.linspace(-1, 1, ANGLES, dtype=S[0].dtype, device=S[0].device)
    centre, reach = torch.full_like(S[0], torch.pi / 4), torch.pi / 4
    for _ in range(2):  # over a quarter of a turn, then about the best of those
        angles = centre + reach * tried
        centre = angles.gather(-1, _bits(S, G, angles).argmin(-1, keepdim=True))
        reach *= 2 / (ANGLES - 1)
    return centre.squeeze(-1)


def _bits(S: Sequence[Tensor], G: Sequence[Tensor], angle: Tensor) -> Tensor:
    """Logarithms of the gains of both parts, summed."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            part.clamp_min(torch.finfo(part.dtype).tiny).log()
            for a, b, c in (S, G)
            for part in (
                cos**2 * a + 2 * cos * sin * b + sin**2 * c,
                sin**2 * a - 2 * cos * sin * b + cos**2 * c,
            )
        ]
    ).sum(0)


def means_of(spread: Spread) -> Tensor:
    """Inputs of a usual token and of a first one, (2, D)."""
    return torch.stack((spread.mean, spread.first))


def rounded(t: Tensor) -> Tensor:
    """To bfloat16 and back."""
    return t.to(torch.bfloat16).to(t.dtype)


def refuse_residuals(name: str, asked: Asked) -> None:
    """Raise LrkvError for a rank of keys in a form without residuals."""
    if asked.own_rank:
        raise LrkvError(
            f"--keys {name} has no residuals, and a rank of {asked.own_rank} asks for some",
            "leave --rank-k out or 0, and see --base-width-k",
        )
