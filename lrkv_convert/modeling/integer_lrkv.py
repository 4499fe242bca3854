"""Rows of codes (codes_lrkv.py) met by numbers without being unpacked: products of bytes on a CPU.
Travels with every converted checkpoint.

A byte holds K codes v_0 ... v_(K-1) of p bits each; its first bit lies there inverted, so that as a
signed one it is 128 less than that. What is left of it under the mask of its lowest
p (k + 1) bits is M_k = v_0 + 2^p v_1 + ... + 2^(pk) v_k, so that

    sum_k y_k v_k = sum_k M_k (y_k / 2^(pk) - y_(k+1) / 2^(p(k+1)))            y_K = 0
    v_k = (M_k - M_(k-1)) / 2^(pk)

and a product with codes is one of whole rows of bytes for each mask there is: two of nibbles, four
where there are pairs of bits. Those are products of int8 matrices, exact, which CPUs have
instructions for. The other side is a sum of as many int8 matrices as make it as precise as float32.

Shapes: N batch, S tokens, w latents of a slot, n columns. This file may import torch alone.
"""

from functools import cache

import torch

# bytes of rows, and tokens, at once: what stays in a core's cache
CHUNK, TOKENS = 1 << 23, 1 << 15
# tokens after which sums of products are taken out of int32, which holds half as many again
FLUSH = 1 << 16
PLANES = (8, 4, 2, 1)


@cache
def terms() -> tuple[int, int] | None:
    """The largest whole number that a product takes exactly beside any byte, and how many such
    terms make a number; None where there is no exact product. Without VNNI two neighbours are added
    in 16 bits, and numbers must be half as large.
    """
    for largest, count in ((127, 3), (63, 4)):
        try:
            byte = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, 64).contiguous()
            number = torch.tensor([-largest, largest, largest], dtype=torch.int8).expand(64, 3)
            found = torch._int_mm(byte, number.contiguous())
        except (AttributeError, RuntimeError):
            return None
        if torch.equal(found.long(), byte.long() @ number.long()):
            return largest, count
    return None


def reads(rows: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether rows can be read so beside these numbers."""
    return (
        rows.dtype == torch.uint8
        and rows.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and numbers.dtype != torch.float64
        and not (torch.is_grad_enabled() and numbers.requires_grad)
        and terms() is not None
    )


class Layout:
    """Where the codes of a row lie, and what of its bytes is met: under each mask those of the
    planes that it tells a code of, side by side.

    pieces: of each plane (first latent, latents, how far its bits are shifted in the code); start:
    the first byte of codes.
    """

    def __init__(self, pieces: dict[int, list[tuple[int, int, int]]], start: int):
        self.pieces = pieces
        self.spans: dict[int, tuple[int, int]] = {}  # of a plane: its bytes
        for plane in PLANES:
            size = sum(n for _, n, _ in pieces[plane]) * plane // 8
            if size:
                self.spans[plane] = start, start + size
            start += size
        # of a mask; all bits first: bytes as they lie
        planes: dict[int, list[int]] = {255: []}
        for plane in self.spans:
            for k in range(8 // plane):
                planes.setdefault(2 ** (plane * (k + 1)) - 1, []).append(plane)
        # mask -> bytes of the row (planes of a mask are neighbours), and where they are met
        self.masks: dict[int, tuple[int, int, int]] = {}
        self.width = 0
        for mask, of in planes.items():
            first, last = self.spans[of[0]][0], self.spans[of[-1]][1]
            self.masks[mask] = first, last, self.width
            self.width += last - first

        first, last, _ = self.masks[255]
        # what is met: bytes as they lie, and those under a mask
        self.runs = [slice(0, last - first), slice(last - first, self.width)]

    def met(self, rows: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        """What is met of rows (heads, S, bytes), int8, by `runs`: (heads, S, so many) each. out:
        for what is under a mask.
        """
        first, last, _ = self.masks[255]
        found = [rows[..., first:last].view(torch.int8)]
        for mask, (first, last, at) in self.masks.items():
            if mask != 255:
                at -= self.runs[1].start
                torch.bitwise_and(rows[..., first:last], mask, out=out[..., at : at + last - first])
        return [*found, out.view(torch.int8)] if out.shape[-1] else found

    def parts(self, rows: torch.Tensor, chunk: int):
        """(tokens, what is met of them) of rows (heads, S, bytes), about so many bytes at once."""
        heads, S, _ = rows.shape
        step = min(TOKENS, max(64, chunk // (heads * self.width)))
        held = rows.new_empty(heads, min(step, S), self.width - self.runs[1].start)
        for i in range(0, S, step):
            part = slice(i, min(i + step, S))
            yield part, self.met(rows[:, part], held[:, : part.stop - i])

    def of_bytes(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of codes (..., w) -> of what is met (..., width)."""
        found: dict[int, list[torch.Tensor]] = {mask: [] for mask in self.masks}
        for plane in self.spans:
            K = 8 // plane
            y = torch.cat(
                [weights[..., a : a + n] * 2**shift for a, n, shift in self.pieces[plane]], -1
            ).unflatten(-1, (K, -1))
            for k in range(K):
                own = y[..., k, :] / 2 ** (plane * k)
                if k + 1 < K:
                    own = own - y[..., k + 1, :] / 2 ** (plane * (k + 1))
                found[2 ** (plane * (k + 1)) - 1].append(own)
        return torch.cat([part for parts in found.values() for part in parts], -1)

    def of_codes(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums of what is met (..., width) -> of codes (..., w)."""
        found: dict[int, torch.Tensor] = {}
        for plane, (start, stop) in self.spans.items():
            parts, before = [], None
            for k in range(8 // plane):
                first, _, at = self.masks[2 ** (plane * (k + 1)) - 1]
                held = sums[..., at + start - first : at + stop - first]
                parts.append((held if before is None else held - before) / 2 ** (plane * k))
                before = held
            codes = torch.cat(parts, -1).split([n for _, n, _ in self.pieces[plane]], -1)
            for (a, _, shift), part in zip(self.pieces[plane], codes):
                found[a] = found[a] + part * 2**shift if a in found else part * 2**shift
        return torch.cat([found[a] for a in sorted(found)], -1)


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (..., n, L) -> int8 terms of falling size, (..., terms n, L), those of a size
    together, and the unit of the first, (..., n, 1); that of each following one is twice the
    largest as small.
    """
    largest, count = terms() or (0, 0)
    unit = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(x.dtype).tiny)
    rest, found = x / unit, []
    for _ in range(count):
        whole = rest.round()
        found.append(whole.to(torch.int8))
        rest = rest.sub_(whole).mul_(2 * largest)
    return torch.cat(found, -2), unit


def together(products: torch.Tensor, n: int) -> torch.Tensor:
    """Products of terms (..., terms n, L) int32, in units of the first: (..., n, L)."""
    largest, _ = terms() or (0, 0)
    *others, total = products.split(n, -2)
    total = total.float()
    for product in reversed(others):
        total.mul_(1 / (2 * largest)).add_(product)
    return total


def dot(
    layout: Layout, weights: torch.Tensor, rows: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """sum_i weights_i code_i (N, heads, n, S) of weights (N, heads, n, w) float32 and rows (N,
    heads, S, bytes).
    """
    N, heads, S, _ = rows.shape
    n = weights.shape[-2]
    weights = layout.of_bytes(weights)
    shift = 128 * weights[..., layout.runs[0]].sum(-1, keepdim=True)  # signed bytes are so less
    ready = [split(weights[..., run].contiguous()) for run in layout.runs if run.stop > run.start]
    out = rows.new_empty(N, heads, n, S, dtype=torch.float32)
    for i in range(N):
        for part, met in layout.parts(rows[i], chunk):
            total = shift[i]
            for (numbers, unit), held in zip(ready, met):
                products = together(_products(numbers[i], held.mT), n)
                total = torch.addcmul(total, products, unit[i])
            out[i, :, :, part] = total
    return out


def mix(
    layout: Layout,
    weights: torch.Tensor,
    rows: torch.Tensor,
    chunk: int = CHUNK,
    flush: int = FLUSH,
) -> torch.Tensor:
    """sum_s weights_s code_s (N, heads, n, w) of weights (N, heads, n, S) float32 and rows (N,
    heads, S, bytes).
    """
    N, heads, S, _ = rows.shape
    n = weights.shape[-2]
    numbers, unit = split(weights)
    out = weights.new_zeros(N, heads, n, layout.width)
    for i in range(N):
        sums: list[torch.Tensor] = []
        since = 0
        for part, met in layout.parts(rows[i], chunk):
            own = numbers[i, :, :, part]
            products = [_products(own, held) for held in met]
            sums = [a.add_(b) for a, b in zip(sums, products)] if since else products
            since += own.shape[-1]
            if since >= flush or part.stop == S:
                for run, held in zip(layout.runs, sums):
                    out[i, :, :, run].addcmul_(together(held, n), unit[i])
                since = 0
    out[..., layout.runs[0]] += 128 * weights.sum(-1, keepdim=True)
    return layout.of_codes(out)


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of int8 matrices (heads, n, k) and (heads, k, l), int32."""
    out = a.new_empty(len(a), a.shape[1], b.shape[2], dtype=torch.int32)
    for own, other, held in zip(a, b, out):
        torch._int_mm(own, other, out=held)
    return out
