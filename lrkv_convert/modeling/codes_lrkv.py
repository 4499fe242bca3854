"""Latents as codes: what one token caches of one slot as a row of bytes, a few bits a latent.
Travels with every converted checkpoint; benchmarks/NOTES.md has why it is made so.

A row is one 16-bit scale t and the codes of its latents, those of most bits first. Latents u come
normalised (what normalises them lies in the weights), so that one scale serves all:

    t = max_i A_b |u_i|                                     A_b: how far b bits reach, in scales
    code_i = floor(u_i 2^(b-1) / t) + 2^(b-1)               cut to b bits
    u_i ~ t ((code_i + 1/2) / 2^(b-1) - 1)

Two centres are taken off before: the mean of usual tokens, or that of the first token of a text,
which attention uses as a sink and which is unlike all others. The nearer one is chosen for each
token; the sign of t says which, so it costs nothing, needs no position and holds under any padding.

Widths are made of planes of 8, 4, 2 and 1 bits, each packed by itself:

    bits      8     6      4     3      2
    planes    8     4+2    4     2+1    2

The first bit of each byte of codes is inverted: as a signed one it is 128 less than the other.

Shapes: N batch, S tokens, w latents of a slot, n columns of what they are met by. This file may
import torch and integer_lrkv.py alone.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import nn

from . import integer_lrkv as integer

# bits -> the planes that hold them, high bits first
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}
# A_b: coarse codes do not reach as far as the largest latent
REACH = {8: 1.0, 6: 1.0, 4: 0.9, 3: 0.8, 2: 0.65}
# latents of a width come in multiples of this, so that planes fill their bytes
MULTIPLES = {8: 1, 6: 4, 4: 2, 3: 8, 2: 4}
Turn = Callable[[torch.Tensor], torch.Tensor]
Blocks = Sequence[tuple[int, int]]  # (bits, how many latents have so many), most bits first
SCALE_BYTES = 2  # of float16
SMALLEST = 2.0**-14  # of a scale: the smallest normal number of float16
LARGEST = 65504.0


def row_bytes(blocks: Blocks) -> int:
    """Bytes of a row."""
    return SCALE_BYTES + sum(bits * count for bits, count in blocks) // 8


def check_blocks(blocks: Blocks, width: int) -> None:
    """Raise ValueError for blocks that are not those of so many latents."""
    order = [bits for bits, _ in blocks]
    if unknown := [bits for bits in order if bits not in PLANES]:
        raise ValueError(f"codes have {', '.join(map(str, PLANES))} bits, not {unknown[0]}")
    if order != sorted(set(order), reverse=True):
        raise ValueError(f"codes come once for each width, most bits first, not {order}")
    if sum(n for _, n in blocks) != width or any(n < 0 for _, n in blocks):
        raise ValueError(f"codes of {blocks} do not make {width} latents")
    for bits, count in blocks:
        if count % MULTIPLES[bits]:
            raise ValueError(
                f"latents of {bits} bits come in multiples of {MULTIPLES[bits]}, not {count}"
            )


class Codes(nn.Module):
    """How the latents of one slot become codes, and back.

    Args: blocks, width w of the slot, its heads (1 for what all share, or groups of those that
    share some), KV heads H, head width d.
    Raises ValueError for blocks that do not fit.

    centres (2, heads, w): of usual tokens and of sinks; lift (H, d): what the heads of a sink have
    more than those of a usual token, whatever its codes say.
    """

    def __init__(self, blocks: Blocks, width: int, heads: int, num_heads: int, d: int):
        super().__init__()
        check_blocks(blocks, width)
        self.blocks = tuple((bits, count) for bits, count in blocks if count)
        self.width = width
        self.bytes = row_bytes(blocks)
        self.centres = nn.Parameter(torch.empty(2, heads, width))
        self.lift = nn.Parameter(torch.empty(num_heads, d))
        # plane -> [(first latent, latents, how far its bits are shifted in the code)]
        self.planes: dict[int, list[tuple[int, int, int]]] = {8: [], 4: [], 2: [], 1: []}
        first = 0
        for bits, count in self.blocks:
            left = bits
            for plane in PLANES[bits]:
                left -= plane
                self.planes[plane].append((first, count, left))
            first += count
        self._known: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def layout(self) -> integer.Layout:
        """For products with bytes; made when it is needed, as a CPU alone does."""
        return integer.Layout(self.planes, SCALE_BYTES, self.width)

    def extra_repr(self) -> str:
        return ", ".join(f"{count} of {bits} bits" for bits, count in self.blocks)

    def levels(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """2^(b-1) and A_b of each latent, (w,) float32 each."""
        if device not in self._known:
            each = lambda f: torch.tensor(
                [f(bits) for bits, count in self.blocks for _ in range(count)],
                dtype=torch.float32,
                device=device,
            )
            self._known[device] = each(lambda bits: 2.0 ** (bits - 1)), each(REACH.get)
        return self._known[device]

    def codes(self, u: torch.Tensor, turn: Turn | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (N, heads, S, w) -> codes, whole numbers, float32, and scales (N, heads, S, 1),
        exact in float16; negative: of a sink. turn: what is done to latents about their centre
        before they become codes.
        """
        half, reach = self.levels(u.device)
        usual, sink = (u.float() - centre.float().unsqueeze(1) for centre in self.centres)
        high, low = ((each.abs() * reach).amax(-1, keepdim=True) for each in (usual, sink))
        is_sink = low < high
        t, u = torch.where(is_sink, low, high), torch.where(is_sink, sink, usual)
        if turn is not None:
            u = turn(u)
            t = (u.abs() * reach).amax(-1, keepdim=True)
        t = t.clamp(SMALLEST, LARGEST).half().float()
        codes = torch.minimum((u * (half / t)).floor_().add_(half).clamp_(min=0), 2 * half - 1)
        return codes, torch.where(is_sink, -t, t)

    def values(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Latents about their centre, as they are read back, and one more that is 1 for sinks:
        (N, heads, S, w + 1) float32.
        """
        half = self.levels(codes.device)[0]
        u = ((codes + 0.5) / half - 1) * scale.abs()
        return torch.cat((u, (scale < 0).to(u.dtype)), dim=-1)

    def through(self, u: torch.Tensor, turn: Turn | None = None) -> torch.Tensor:
        """Latents as they are read back from their codes, without codes, for training: gradients
        pass as if nothing had been rounded (straight-through, Bengio et al. 2013).
        """
        with torch.no_grad():
            codes, scale = self.codes(u, turn)
            read = self.values(codes, scale)
        centre = torch.where(scale < 0, *(c.float().unsqueeze(1) for c in self.centres.flip(0)))
        about = u.float() - centre
        exact = torch.cat((about if turn is None else turn(about), read[..., -1:]), dim=-1)
        return exact + (read - exact).detach()

    def pack(self, u: torch.Tensor, turn: Turn | None = None) -> torch.Tensor:
        """Latents (N, heads, S, w) -> rows (N, heads, S, bytes) uint8."""
        codes, scale = self.codes(u, turn)
        codes, parts = codes.to(torch.uint8), [scale.half().view(torch.uint8)]
        for plane, pieces in self.planes.items():
            if not pieces:
                continue
            bits = [
                (codes[..., first : first + n] >> shift) & (2**plane - 1)
                for first, n, shift in pieces
            ]
            packed = torch.cat(bits, dim=-1).unflatten(-1, (8 // plane, -1))
            row = packed[..., 0, :]
            for i in range(1, 8 // plane):
                row = row | (packed[..., i, :] << (plane * i))
            parts.append(row ^ 128)
        return torch.cat(parts, dim=-1)

    def unpacked(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, heads, S, bytes) -> codes (N, heads, S, w) uint8 and scales (N, heads, S, 1)
        float32.
        """
        at, found = SCALE_BYTES, {}
        for plane, pieces in self.planes.items():
            total = sum(n for _, n, _ in pieces)
            held = rows[..., at : at + total * plane // 8] ^ 128
            at += total * plane // 8
            if not total:
                continue
            if plane < 8:
                last = 8 // plane - 1
                held = torch.cat(
                    [
                        (held >> (plane * i))
                        if i == last
                        else (held >> (plane * i)) & (2**plane - 1)
                        for i in range(last + 1)
                    ],
                    dim=-1,
                )
            for (first, _, shift), bits in zip(pieces, held.split([n for _, n, _ in pieces], -1)):
                bits = bits << shift if shift else bits
                found[first] = found[first] | bits if first in found else bits
        return torch.cat([found[first] for first in sorted(found)], dim=-1), self.scales(rows)

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows (N, heads, S, bytes), (N, heads, S, 1) float32; negative: of a sink."""
        places = (rows.storage_offset(), rows.shape[-1], *rows.stride()[:-1])
        if rows.stride(-1) == 1 and all(place % SCALE_BYTES == 0 for place in places):
            return rows.view(torch.float16)[..., :1].float()
        # a copy of its own: a single row of an odd number of bytes passes for contiguous as it lies
        scale = rows[..., :SCALE_BYTES].clone(memory_format=torch.contiguous_format)
        return scale.view(torch.float16).float()

    def read(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows, or what `through` gave -> latents and the mark of sinks (N, heads, S, w + 1)."""
        if rows.dtype != torch.uint8:
            return rows.to(dtype)
        return self.values(*self.unpacked(rows)).to(dtype)

    def marks(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of the rows, or of what `through` gave, are sinks: (N, heads, S), 1 or 0."""
        if rows.dtype != torch.uint8:
            return rows[..., -1]
        return (self.scales(rows).squeeze(-1) < 0).float()

    def dot(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Weights (N, heads, n, w + 1) and what `read` gives: their products (N, heads, n, S). On a
        CPU without unpacking anything.
        """
        if not integer.reads(rows, weights):
            # tokens come first in the product: a CPU reads them faster so
            return (self.read(rows, weights.dtype) @ weights.mT).mT
        scale = self.scales(rows).mT  # (N, heads, 1, S)
        met = integer.dot(self.layout, weights[..., :-1].float(), rows).mul_(scale.abs())
        return met.addcmul_((scale < 0).float(), weights[..., -1:].float()).to(weights.dtype)

    def mix(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Weights (N, heads, n, S) times what `read` gives: (N, heads, n, w + 1)."""
        if not integer.reads(rows, weights):
            return weights @ self.read(rows, weights.dtype)
        scale, seen = self.scales(rows), weights.float()
        latents = integer.mix(self.layout, seen, scale.abs().mT, rows)
        mark = seen @ (scale < 0).float()
        return torch.cat((latents, mark), dim=-1).to(weights.dtype)
