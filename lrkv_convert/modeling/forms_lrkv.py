"""Forms of keys other than the joint one of factors_lrkv.py: each a class that says only how it
differs. Travels with every converted checkpoint. Their twins in the library, which fit and plan
them, are in lrkv_convert/forms.

Shapes as in factors_lrkv.py. This file may import torch, transformers and its siblings only.
"""

import torch
from torch import nn
from transformers import initialization as init

from .codes_lrkv import Blocks
from .factors_lrkv import (
    LowRankHeads,
    _fold,
    _rotated_scores,
    _scores,
    rotate,
)


class RotaryHeads(LowRankHeads):
    """The base lies in the cache after rotation (C = I: it passes through RoPE as it is), the
    residual before.
    """

    form = "rotary"
    has_maps = False
    caches_rotated = True

    def __init__(self, width, num_heads, head_dim, base_width, rank, alignment, bias, codes=None):
        super().__init__(width, num_heads, head_dim, base_width, rank, alignment, bias)
        self.refuse_codes(codes)
        if alignment:
            self.refuse(alignment)

    def project(self, x, rotation=None, norm=None):
        base, residual = super().project(x)
        return base if self.W_shared is None else rotate(base, rotation), residual

    def rebuild(self, cached, rotation=None, norm=None):
        base, residual = cached
        own = self._finished(None, residual, rotation, norm)
        if self.W_shared is None:
            return own
        return (base if own is None else base + own).expand(-1, self.num_heads, -1, -1)

    def _turned(self, base, rotation):
        return base


class FullHeads(LowRankHeads):
    """The keys themselves lie in the cache, normalised and rotated, as residuals of rank d without
    B: nothing to rebuild.
    """

    form = "full"
    rotates_on_read, caches_rotated = False, True

    def __init__(self, width, num_heads, head_dim, base_width, rank, alignment, bias, codes=None):
        super().__init__(width, num_heads, head_dim, base_width, rank, alignment, bias)
        self.refuse_codes(codes)
        if (base_width, rank) != (0, head_dim):
            self.refuse(alignment)
        self.B = None

    def project(self, x, rotation=None, norm=None):
        base, heads = super().project(x)
        heads = heads if self.bias is None else heads + self.bias.unsqueeze(1)
        heads = heads if norm is None else norm(heads)
        return base, heads if rotation is None else rotate(heads, rotation)

    def rebuild(self, cached, rotation=None, norm=None):
        return cached[1]

    def read_as_is(self, rotation, norm):
        return True

    def absorb(self, query):
        return [None, query]

    def expand_averages(self, averages):
        return averages[1]


class CommutingHeads(LowRankHeads):
    """Latents that turn with RoPE: n complex numbers z_a = [real parts | imaginary parts], each of
    one frequency j(a), for all heads together, after rotation. K_hj = sum of c_ha z_a over the
    latents of frequency j, with channels j and j + d / 2 of a head as one complex number, so

        q_h . K_h = Re sum_a conj(q_hj(a)) c_ha z_a

    and the query absorbs c: nothing is rebuilt. C (H, m) holds c as z is held, bias (m,) is that of
    z. kept: how many latents each frequency has (default: alike); they are in the order of
    frequencies.
    """

    form = "commuting"
    found = ("kept",)
    rotates_on_read, caches_rotated = False, True

    def __init__(self, width, num_heads, head_dim, base_width, rank, alignment, bias, kept=None):
        super().__init__(width, num_heads, head_dim, base_width, rank, True, False)
        n, frequencies = base_width // 2, head_dim // 2
        even = [n // frequencies + (j < n % frequencies) for j in range(frequencies)]
        self.kept: list[int] = kept or even
        if rank or base_width % 2 or 2 * sum(self.kept) != base_width:
            self.refuse(alignment)
        self.C = nn.Parameter(torch.empty(num_heads, base_width))
        self.bias = nn.Parameter(torch.empty(base_width)) if bias else None

    def slots(self):
        return [(1, self.base_width)]

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """j(a) of each latent, (n,)."""
        known, index = getattr(self, "_index", (None, None))
        if index is None or known is not self.kept or index.device != device:
            places = [j for j, count in enumerate(self.kept) for _ in range(count)]
            index = torch.tensor(places, device=device)
            self._index = self.kept, index
        return index

    def project(self, x, rotation=None, norm=None):
        z = self.W_shared(x)
        z = (z if self.bias is None else z + self.bias).unsqueeze(1)
        if rotation is None:
            return (z,)
        at = self.frequencies(x.device)
        return (rotate(z, tuple(torch.cat((t[..., at],) * 2, dim=-1) for t in rotation)),)

    def maps(self, dtype: torch.dtype) -> torch.Tensor:
        """What takes latents to heads, as real numbers, (H, m, d)."""
        at = self.frequencies(self.C.device)
        return _complex_maps(*self.C.to(dtype).chunk(2, dim=1), at, self.head_dim)

    def rebuild(self, cached, rotation=None, norm=None):
        return self._aligned(cached[0], self.maps(self.C.dtype))

    def read_as_is(self, rotation, norm):
        return True

    def absorb(self, query):
        real, imaginary = self.C.to(query.dtype).chunk(2, dim=1)  # (H, n)
        return [_absorbed(query, real, imaginary, self.frequencies(query.device))]

    @torch.no_grad()
    def matrices(self):
        return self.W_shared.weight.T.double() @ self.maps(torch.float64)

    def reset_parameters(self):
        init.normal_(self.W_shared.weight, std=self.width**-0.5)
        init.normal_(self.C, std=(self.head_dim / (2 * self.base_width)) ** 0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


class ChannelHeads(LowRankHeads):
    """Keys in their own channels, before rotation, as codes. A latent is a channel, so keys are
    read element by element:

        K_h[i] = C_a z_a + b_h[i]       a: the latent of channel i of head h, if it was kept

    then rotated and met by their queries. C (m,) holds the sizes of latents. bits: of every
    channel, a string of d digits for each head, 0 where it was dropped (default: the first channels
    are kept); latents are in the order of bits, most first, and of channels.
    """

    form = "channels"
    found = ("bits",)
    kernel_reads = False  # latents would have to be put into their places there

    def __init__(
        self, width, num_heads, head_dim, base_width, rank, alignment, bias, codes=None, bits=None
    ):
        super().__init__(width, num_heads, head_dim, base_width, rank, True, bias, codes)
        grid = num_heads * head_dim
        if rank or not 0 < base_width <= grid or self.base_codes is None:
            self.refuse(alignment)
        blocks: Blocks = self.base_codes.blocks
        if bits is None:
            digits = "".join(str(b) * n for b, n in blocks).ljust(grid, "0")
            bits = [digits[h * head_dim : (h + 1) * head_dim] for h in range(num_heads)]
        self.bits: list[str] = bits
        digits = "".join(bits)
        if len(digits) != grid or any(digits.count(str(b)) != n for b, n in blocks):
            raise ValueError(f"bits of {len(digits)} channels are not those of codes {blocks}")
        self.C = nn.Parameter(torch.empty(base_width))

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The channel of each latent (m,), and of each channel (H d,) its latent, that of a dropped
        one is 0.
        """
        known, held = getattr(self, "_places", (None, None))
        if held is None or known is not self.bits or held[0].device != device:
            digits = [int(digit) for digit in "".join(self.bits)]
            order = sorted((i for i, b in enumerate(digits) if b), key=lambda i: -digits[i])
            latent = [0] * len(digits)
            for place, i in enumerate(order):
                latent[i] = place
            held = torch.tensor(order, device=device), torch.tensor(latent, device=device)
            self._places = self.bits, held
        return held

    def spread(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (N, 1, S, m + 1) as they lie in the grid of channels (N, 1, S, H d), those
        dropped any number; and how large each is (H d,), those dropped 0.
        """
        return _taken(latents, self.places(latents.device)[1]), self.sizes(latents.dtype)

    def sizes(self, dtype: torch.dtype) -> torch.Tensor:
        """C in the grid, (H d,), 0 where a channel was dropped."""
        of_latent, of_channel = self.places(self.C.device)
        C = self.C.to(dtype)
        return torch.zeros_like(C[:1]).expand(len(of_channel)).index_put((of_latent,), C)

    def constants(self, mark: torch.Tensor) -> torch.Tensor:
        """What a key has beside its latents, (N, H, S, d); mark (N, 1, S, 1): 1 for sinks."""
        bias, lift = (
            t.unsqueeze(1).to(mark.dtype) for t in (self.bias, self.base_codes.lift)
        )  # (H, 1, d)
        return torch.addcmul(bias, mark, lift)

    def unrotated(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, 1, S, m + 1) -> keys (N, H, S, d) before norm and rotation."""
        grid, size = self.spread(latents)
        heads = grid.squeeze(1).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        sizes = size.view(self.num_heads, 1, self.head_dim)
        return torch.addcmul(self.constants(latents[..., -1:]), heads, sizes)

    def rebuild(self, cached, rotation=None, norm=None):
        keys = self.unrotated(self.read(cached)[0])
        keys = keys if norm is None else norm(keys)
        return keys if rotation is None else rotate(keys, rotation)

    def read_as_is(self, rotation, norm):
        return False

    def scores(self, query, cached, rotation=None, norm=None):
        out = []
        for part in self._chunks(cached, query.device, True):
            latents = self._part(cached, part, query.dtype)[0]
            tables = None if rotation is None else tuple(t[:, part] for t in rotation)
            out.append(self.met(query, latents, tables, norm))
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def met(self, query, latents, rotation, norm):
        """Scores (N, H, Q, S) of queries and latents (N, 1, S, m + 1). rotation: of these tokens,
        or None.
        """
        keys = self.unrotated(latents)
        keys = keys if norm is None else norm(keys)
        if rotation is None:
            return _scores(query, keys)
        return _rotated_scores(query, keys, tuple(t.unsqueeze(1) for t in rotation))

    def channel_maps(self) -> torch.Tensor:
        """What takes the grid of channels, sized, to heads, (H, H d, d) float64."""
        eye = torch.eye(self.num_heads * self.head_dim, dtype=torch.float64, device=self.C.device)
        return eye.view(-1, self.num_heads, self.head_dim).transpose(0, 1)

    @torch.no_grad()
    def matrices(self):
        W = self.W_shared.weight.T.double() * self.C.double()  # (D, m)
        grid = W.new_zeros(self.width, self.num_heads * self.head_dim)
        grid[:, self.places(W.device)[0]] = W
        return grid @ self.channel_maps()

    def reset_parameters(self):
        init.normal_(self.W_shared.weight, std=self.width**-0.5)
        init.ones_(self.C)
        for constant in (self.bias, self.base_codes.centres, self.base_codes.lift):
            init.zeros_(constant)


class AxesHeads(ChannelHeads):
    """Latents of each head in axes of its own, before norm and rotation, as codes in one row for
    all heads: a grid as of channels, and

        K_h = z_h axes_h + b_h          axes (H, d, d)

    A head is rebuilt from its own latents when it is read; where nothing turns or normalises it,
    queries absorb the axes instead.
    """

    form = "axes"

    def __init__(
        self, width, num_heads, head_dim, base_width, rank, alignment, bias, codes=None, bits=None
    ):
        super().__init__(width, num_heads, head_dim, base_width, rank, alignment, bias, codes, bits)
        self.axes = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))

    def own(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of each head (N, H, S, d), those dropped any number, and its axes with the sizes
        of latents, of those dropped 0, (H, d, d).
        """
        grid, size = self.spread(latents)
        heads = grid.squeeze(1).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return heads, self.axes.to(size.dtype) * size.view(self.num_heads, self.head_dim, 1)

    def unrotated(self, latents):
        heads, axes = self.own(latents)
        return heads @ axes + self.constants(latents[..., -1:])

    def met(self, query, latents, rotation, norm):
        if rotation is not None or norm is not None:
            return super().met(query, latents, rotation, norm)
        heads, axes = self.own(latents)
        bias, lift = (
            query @ t.to(query.dtype).unsqueeze(-1) for t in (self.bias, self.base_codes.lift)
        )
        mark = latents[..., -1].unsqueeze(2)  # (N, 1, 1, S)
        return _scores(query @ axes.mT, heads) + bias + mark * lift

    def channel_maps(self):
        maps = torch.zeros(self.num_heads, *self.axes.shape, dtype=torch.float64)
        maps = maps.to(self.axes.device)
        each = torch.arange(self.num_heads, device=maps.device)
        maps[each, each] = self.axes.double()
        return maps.flatten(1, 2)

    def reset_parameters(self):
        super().reset_parameters()
        init.normal_(self.axes, std=self.head_dim**-0.5)


class TurningHeads(LowRankHeads):
    """Latents that turn with RoPE, as in `CommutingHeads`, as codes, after rotation. They lie in a
    grid as the channels of keys do: H rows of d numbers, the first half real parts, the other half
    imaginary ones. Heads are in g groups of h = H / g, and row a of those of a group is at
    frequency j a complex number z_aj that these heads share,

        K_hj = sum_a c_haj C_aj z_aj + b_hj

    mix (H, h, d) holds c, for each head and row of its group; C (g, m) the sizes of latents, the
    same for both parts of a number, which have the same bits, too. What latents are taken about is
    in b, which is rotated when it is read. The query absorbs the rest: nothing is rebuilt.

    bits: of each number, a string of d digits for each row, 0 where it was dropped (default: the
    first are kept); latents of a group are in the order of bits, most first, and of the grid.
    """

    form = "turning"
    found = ("bits",)
    kernel_reads = False  # which knows nothing of means that turn
    caches_rotated = True

    def __init__(
        self,
        width,
        num_heads,
        head_dim,
        base_width,
        rank,
        alignment,
        bias,
        codes=None,
        groups=1,
        bits=None,
    ):
        super().__init__(width, num_heads, head_dim, base_width, rank, True, bias, codes, groups)
        h = num_heads // groups
        if rank or not 0 < base_width <= h * head_dim or self.base_codes is None:
            self.refuse(alignment)
        blocks = self.base_codes.blocks
        if any(count % 2 for _, count in blocks):
            raise ValueError(f"codes {blocks} are not those of pairs")
        if bits is None:
            half = "".join(str(b) * (n // 2) for b, n in blocks).ljust(h * head_dim // 2, "0")
            rows = [half[i * head_dim // 2 : (i + 1) * head_dim // 2] * 2 for i in range(h)]
            bits = rows * groups
        self.bits: list[str] = bits
        for group in range(groups):
            rows = bits[group * h : (group + 1) * h]
            digits = "".join(rows)
            if len(digits) != h * head_dim or any(digits.count(str(b)) != n for b, n in blocks):
                raise ValueError(f"bits of {len(digits)} channels are not those of codes {blocks}")
            if any(row[: head_dim // 2] != row[head_dim // 2 :] for row in rows):
                raise ValueError("channels that turn together have different bits")
        self.C = nn.Parameter(torch.empty(groups, base_width))
        self.mix = nn.Parameter(torch.empty(num_heads, h, head_dim))

    def numbers(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Of the n = m / 2 complex numbers of each group, (g, n) each: its row in the group, its
        frequency, and which latents are its real and its imaginary part; and the inverse of the
        last two, (g, m): where a latent lies among [real parts | imaginary parts].
        """
        known, held = getattr(self, "_numbers", (None, None))
        if held is None or known is not self.bits or held[0].device != device:
            d, h = self.head_dim, self.num_heads // self.groups
            found: list[list] = [[], [], [], [], []]
            for group in range(self.groups):
                digits = [int(b) for b in "".join(self.bits[group * h : (group + 1) * h])]
                order = sorted((i for i, b in enumerate(digits) if b), key=lambda i: -digits[i])
                latent = {i: place for place, i in enumerate(order)}
                real = [i for i in sorted(latent) if i % d < d // 2]
                parts = [latent[i] for i in real], [latent[i + d // 2] for i in real]
                places = parts[0] + parts[1]
                back = sorted(range(len(places)), key=places.__getitem__)
                rows, frequencies = [i // d for i in real], [i % d for i in real]
                for side, values in zip(found, (rows, frequencies, *parts, back)):
                    side.append(values)
            held = tuple(torch.tensor(side, device=device) for side in found)
            self._numbers = self.bits, held
        return held

    def turned(self, latents: torch.Tensor, rotation: tuple) -> torch.Tensor:
        """Latents (N, g, T, m) rotated by (cos, sin) (1 or N, T, d)."""
        _, frequency, *parts, back = self.numbers(latents.device)
        left, right = (_taken(latents, part.unsqueeze(1)) for part in parts)
        cos, sin = (_taken(t.unsqueeze(1), frequency.unsqueeze(1)) for t in rotation)
        z = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return _taken(z, back.unsqueeze(1)).to(latents.dtype)

    def encode(self, x, rotation=None, norm=None, through=False):
        base, own = self.project(x)
        turn = None if rotation is None else lambda about: self.turned(about, rotation)
        coder = self.base_codes
        made = coder.through(base, turn).to(base.dtype) if through else coder.pack(base, turn)
        return made, own

    def coefficients(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Real and imaginary parts of c C, and the frequency of each number, (H, n) each."""
        row, frequency, left, *_ = self.numbers(self.mix.device)
        h, half = self.num_heads // self.groups, self.head_dim // 2
        size = self.C.to(dtype).gather(1, left)  # (g, n)
        mix = self.mix.to(dtype).unflatten(0, (self.groups, h)).flatten(2)  # (g, h, h d)
        at = (row * self.head_dim + frequency).unsqueeze(1)
        parts = [_taken(mix, at + shift) * size.unsqueeze(1) for shift in (0, half)]
        return (*(part.flatten(0, 1) for part in parts), frequency.repeat_interleave(h, dim=0))

    def maps(self, dtype: torch.dtype) -> torch.Tensor:
        """What takes latents to heads, (H, m, d)."""
        maps = _complex_maps(*self.coefficients(dtype), self.head_dim)  # (H, 2 n, d)
        back = self.numbers(maps.device)[-1].repeat_interleave(self.num_heads // self.groups, dim=0)
        return maps.gather(1, back.unsqueeze(-1).expand(-1, -1, self.head_dim))

    def absorb(self, query):
        """What sinks have more comes later: it turns."""
        real, imaginary, at = self.coefficients(query.dtype)
        absorbed = _absorbed(query, real, imaginary, at)
        back = self.numbers(query.device)[-1].repeat_interleave(
            self.num_heads // self.groups, dim=0
        )
        absorbed = _taken(absorbed, back.unsqueeze(1))
        return [torch.cat((absorbed, torch.zeros_like(absorbed[..., :1])), dim=-1), None]

    def sinks(self, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens are sinks to each head, (N, H, S)."""
        marks = self.base_codes.marks(rows)
        return marks.repeat_interleave(self.num_heads // self.groups, dim=1)

    def scores(self, query, cached, rotation=None, norm=None):
        assert rotation is not None  # it goes with RoPE alone
        scores, sinks = self._met(query, cached), self.sinks(cached[0]).unsqueeze(2)
        # what keys have beside their latents turns as they do: met at each position
        scores = scores.add_(self._turning_scores(self.bias, query, rotation))
        if torch.compiler.is_compiling() or query.device.type != "cpu":
            return torch.addcmul(
                scores, sinks, self._turning_scores(self.base_codes.lift, query, rotation)
            )
        at = sinks.flatten(0, 2).any(0).nonzero().squeeze(1)  # few
        there = [table[:, at] for table in rotation]
        more = self._turning_scores(self.base_codes.lift, query, there) * sinks[..., at]
        return scores.index_add_(-1, at, more.to(scores.dtype))

    def _turning_scores(
        self, constant: torch.Tensor, query: torch.Tensor, rotation
    ) -> torch.Tensor:
        """Scores (N, H, Q, S) of queries and something (H, d) that turns."""
        half = self.head_dim // 2
        q = _fold(constant.unsqueeze(1).to(query.dtype), query, rotation)  # (N, H, Q, d)
        cos, sin = (t[..., :half].to(query.dtype).mT for t in rotation)  # (1 or N, d / 2, S)
        left, right = q.flatten(1, 2).split(half, dim=-1)
        if len(cos) < len(left):
            cos, sin = cos.expand(len(left), -1, -1), sin.expand(len(left), -1, -1)
        return torch.baddbmm(left @ cos, right, sin).unflatten(1, query.shape[1:3])

    def rebuild(self, cached, rotation=None, norm=None):
        z = self.read(cached)[0][..., :-1]
        bias, lift = (t.unsqueeze(1).to(z.dtype) for t in (self.bias, self.base_codes.lift))
        constant = torch.addcmul(bias, self.sinks(cached[0]).unsqueeze(-1).to(z.dtype), lift)
        constant = constant if rotation is None else rotate(constant, rotation)
        return self._aligned(z, self.maps(z.dtype)) + constant

    @torch.no_grad()
    def matrices(self):
        W = self.W_shared.weight.T.double().view(self.width, self.groups, -1).transpose(0, 1)
        W = W.repeat_interleave(self.num_heads // self.groups, dim=0)  # (H, D, m)
        return W @ self.maps(torch.float64)

    def reset_parameters(self):
        init.normal_(self.W_shared.weight, std=self.width**-0.5)
        init.ones_(self.C)
        for constant in (self.bias, self.base_codes.centres, self.base_codes.lift):
            init.zeros_(constant)
        init.normal_(self.mix, std=(2 * self.mix.shape[1]) ** -0.5)


def _taken(latents: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Latents (..., w) at places (n,), or (..., n), (..., n); `gather` is ten times as fast as
    `index_select` along the last dimension of a CPU tensor.
    """
    shape = torch.broadcast_shapes(latents.shape[:-1], at.shape[:-1])
    return latents.expand(*shape, -1).gather(-1, at.expand(*shape, -1))


def _complex_maps(
    real: torch.Tensor, imaginary: torch.Tensor, at: torch.Tensor, d: int
) -> torch.Tensor:
    """Complex numbers c (H, n), of frequencies at (n,) or (H, n), as maps from [real parts |
    imaginary parts] of latents to heads, (H, 2 n, d).
    """
    places = nn.functional.one_hot(at, d // 2).to(real.dtype)  # (n, d / 2)
    real, imaginary = real.unsqueeze(-1), imaginary.unsqueeze(-1)
    of_real = torch.cat((real * places, imaginary * places), dim=-1)
    of_imaginary = torch.cat((-imaginary * places, real * places), dim=-1)
    return torch.cat((of_real, of_imaginary), dim=1)


def _absorbed(
    query: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Queries (N, H, Q, d) with the same in them, (N, H, Q, 2 n)."""
    at = at.unsqueeze(-2)  # (1, n) or (H, 1, n)
    left, right = _taken(query, at), _taken(query, query.shape[-1] // 2 + at)  # (N, H, Q, n)
    real, imaginary = real.unsqueeze(1), imaginary.unsqueeze(1)  # (H, 1, n)
    return torch.cat((left * real + right * imaginary, right * real - left * imaginary), dim=-1)


FORMS: dict[str, type[LowRankHeads]] = {
    form.form: form
    for form in (
        LowRankHeads,
        RotaryHeads,
        CommutingHeads,
        FullHeads,
        ChannelHeads,
        AxesHeads,
        TurningHeads,
    )
}


def low_rank_heads(
    config,
    layer_idx: int,
    side: str,
    bias: bool,
    name: str = "lrkv",
    width: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
) -> LowRankHeads:
    """The keys' or values' module of one layer, from the field `name` of the config. width D, heads
    H, head_dim d: as the config says, unless given.

    config.lrkv = {"keys": {"base_width": [m per layer], "rank": [r per layer], "alignment": bool,
    "form": str, "codes": [those of base and residual per layer, if there are any], "groups": [of
    heads that share a base per layer, if there are several]}, "values": {...}}, and lists of what a
    form has `found`.
    """
    field = getattr(config, name, None)
    if field is None:
        raise ValueError(
            f"{type(config).__name__} has no `{name}` field: it must give base widths and ranks per"
            " layer"
        )
    spec, width = field[side], width or config.hidden_size
    heads = heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = (
        head_dim
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    form = FORMS[spec.get("form", "joint")]
    return form(
        width,
        heads,
        head_dim,
        spec["base_width"][layer_idx],
        spec["rank"][layer_idx],
        spec["alignment"],
        bias,
        **{
            name: spec[name][layer_idx] for name in ("codes", "groups", *form.found) if name in spec
        },
    )
