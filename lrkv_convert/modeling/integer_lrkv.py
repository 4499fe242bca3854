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

import math
import threading
from functools import cache

import torch

# bytes of rows, and tokens, at once: what stays in a core's cache
CHUNK, TOKENS = 1 << 23, 1 << 15
# tokens after which sums of products are taken out of int32, which holds half as many again
FLUSH = 1 << 16
PLANES = (8, 4, 2, 1)
int_mm = torch.ops.aten._int_mm


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
            found = int_mm(byte, number.contiguous())
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


class Scratch(threading.local):
    """Memory that is used again, by what it is for: to get it anew from the system at every step
    can cost as much as what is done with it, by the state of the heap.
    """

    def __init__(self):
        self.held: dict[str, torch.Tensor] = {}

    def of(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count, held = math.prod(shape), self.held.get(name)
        if held is None or len(held) < count:
            # what is made in inference mode cannot be written outside of it
            with torch.inference_mode(False):
                held = self.held[name] = torch.empty(count, dtype=dtype, device="cpu")
        return held[:count].view(shape)


scratch = Scratch()


class Layout:
    """Where the codes of a row lie, and what of its bytes is met: all as they lie, and behind them
    under each mask those of the planes that it tells a code of.

    pieces: of each plane (first latent, latents, how far its bits are shifted in the code); start:
    the first byte of codes; width w.

    A latent with weight 1 is met as two bytes times `weights` at most in each of its planes, and
    `constant` (w,) comes to that: bytes as they lie are 128 less, and codes are read at their
    middle (c + 1/2) / 2^(b-1) - 1.
    """

    def __init__(self, pieces: dict[int, list[tuple[int, int, int]]], start: int, width: int):
        self.start, spans = start, {}  # of a plane: its bytes
        for plane in PLANES:
            size = sum(n for _, n, _ in pieces[plane]) * plane // 8
            if size:
                spans[plane] = start, start + size
            start += size
        # mask -> the planes that it tells a code of, neighbours; all bits first
        planes: dict[int, list[int]] = {255: []}
        for plane in spans:
            for k in range(8 // plane):
                planes.setdefault(2 ** (plane * (k + 1)) - 1, []).append(plane)
        # mask -> bytes of the row, and where they are met
        self.masks: dict[int, tuple[int, int, int]] = {}
        self.met_bytes = 0
        for mask, of in planes.items():
            first, last = spans[of[0]][0], spans[of[-1]][1]
            self.masks[mask] = first, last, self.met_bytes
            self.met_bytes += last - first
        self.whole = start - self.start  # bytes that are met as they lie
        # of a latent: (byte that is met, weight) of each plane's two, the bits of its code
        of_latent: list[list[tuple[int, float]]] = [[] for _ in range(width)]
        depth = [0] * width
        for plane, (first, last) in spans.items():
            places = [(a + i, shift) for a, n, shift in pieces[plane] for i in range(n)]
            for at, (latent, shift) in enumerate(places):
                k, byte = divmod(at, last - first)
                size = 2.0 ** (shift - plane * k)
                for own, sign in ((k, 1), (k - 1, -1))[: 2 if k else 1]:
                    begin, _, met = self.masks[2 ** (plane * (own + 1)) - 1]
                    of_latent[latent].append((met + first + byte - begin, sign * size))
                depth[latent] += plane
        most = max(map(len, of_latent))
        of_byte: list[list[tuple[int, float]]] = [[] for _ in range(self.met_bytes)]
        constant = []
        for latent, (found, bits) in enumerate(zip(of_latent, depth)):
            half = 2.0 ** (bits - 1)
            found[:] = [(at, weight / half) for at, weight in found]
            for at, weight in found:
                of_byte[at].append((latent, weight))
            shifted = sum(128 * weight for at, weight in found if at < self.whole)
            constant.append(shifted + 0.5 / half - 1)
            found += [(0, 0.0)] * (most - len(found))
        for found in of_byte:
            found += [(0, 0.0)] * (2 - len(found))
        self.constant = torch.tensor(constant, device="cpu")
        self.latents, self.bytes = _table(of_latent), _table(of_byte)

    def of_bytes(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of latents (..., w) -> of what is met (..., met_bytes)."""
        return _gathered(weights, *self.bytes)

    def of_latents(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums of what is met (..., met_bytes) -> of latents (..., w), but for the constant."""
        return _gathered(sums, *self.latents)

    def met(self, rows: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
        """What is met of rows (heads, S, bytes), int8: bytes as they lie, and those under a mask,
        for which out is.
        """
        found = [rows[..., self.start : self.start + self.whole].view(torch.int8)]
        for mask, (first, last, at) in self.masks.items():
            if mask != 255:
                at -= self.whole
                torch.bitwise_and(rows[..., first:last], mask, out=out[..., at : at + last - first])
        return [*found, out.view(torch.int8)] if out.shape[-1] else found

    def parts(self, rows: torch.Tensor, chunk: int):
        """(tokens, what is met of them) of rows (heads, S, bytes), about so many bytes at once."""
        heads, S, _ = rows.shape
        step = min(TOKENS, max(64, chunk // (heads * self.met_bytes)))
        for i in range(0, S, step):
            part = slice(i, min(i + step, S))
            size = heads, part.stop - i, self.met_bytes - self.whole
            yield part, self.met(rows[:, part], scratch.of("masked", torch.uint8, *size))


def _table(found: list[list[tuple[int, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and weights, (n, how many there are) each -> (how many n,), (how many, n)."""
    places, weights = (
        torch.tensor([[pair[i] for pair in row] for row in found], device="cpu") for i in (0, 1)
    )
    return places.T.flatten(), weights.T.contiguous()


def _gathered(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    taken = x.gather(-1, places.expand(*x.shape[:-1], -1)).unflatten(-1, weights.shape)
    return (taken * weights).sum(-2)


def split(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (heads, n, L) -> int8 terms of falling size, (heads, terms n, L), those of a size
    together, and the unit of the first, (heads, n, 1); that of each following one is twice the
    largest as small. name: of the memory that holds them.
    """
    largest, count = terms() or (0, 0)
    heads, n, L = x.shape
    new = lambda what, *shape: scratch.of(f"{name}, {what}", torch.float32, *shape)
    unit = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True) / largest
    unit.clamp_min_(torch.finfo(torch.float32).tiny)
    rest, whole = new("rest", heads, n, L), new("whole", heads, n, L)
    found = scratch.of(name, torch.int8, heads, count, n, L)
    torch.div(x, unit, out=rest)
    for i in range(count):
        found[:, i].copy_(torch.round(rest, out=whole))
        rest.sub_(whole).mul_(2 * largest)
    return found.flatten(1, 2), unit


def sums(a: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
    """Products of int8 matrices (heads, n, k) and (heads, k, l), int32, in memory of this name."""
    out = scratch.of(name, torch.int32, len(a), a.shape[1], b.shape[2])
    for own, other, held in zip(a, b, out):
        int_mm.out(own, other, out=held)
    return out


def together(products: torch.Tensor, n: int) -> torch.Tensor:
    """Products of terms (heads, terms n, l), in units of the first: (heads, n, l), which the next
    ones overwrite.
    """
    largest, count = terms() or (0, 0)
    found = scratch.of("together", torch.float32, *products.shape).copy_(products)
    first, *others = found.unflatten(1, (count, n)).unbind(1)
    for i, other in enumerate(others):
        first.add_(other, alpha=(2.0 * largest) ** -(i + 1))
    return first


def dot(
    layout: Layout, weights: torch.Tensor, rows: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """sum_i weights_i u_i (N, heads, n, S) of weights (N, heads, n, w) float32 and latents u of
    rows (N, heads, S, bytes), in their scales.
    """
    N, heads, S, _ = rows.shape
    n = weights.shape[-2]
    constant = (weights * layout.constant).sum(-1, keepdim=True)
    parts = layout.of_bytes(weights).split((layout.whole, layout.met_bytes - layout.whole), -1)
    out = rows.new_empty(N, heads, n, S, dtype=torch.float32).copy_(constant)
    for i in range(N):
        ready = [split(part[i], f"run {k}") for k, part in enumerate(parts) if part.shape[-1]]
        for part, met in layout.parts(rows[i], chunk):
            for (numbers, unit), held in zip(ready, met):
                out[i, :, :, part].addcmul_(together(sums(numbers, held.mT, "sums"), n), unit)
    return out


def mix(
    layout: Layout,
    weights: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    chunk: int = CHUNK,
    flush: int = FLUSH,
) -> torch.Tensor:
    """sum_s weights_s scale_s u_s (N, heads, n, w) of weights (N, heads, n, S) and scales (N,
    heads, 1, S) float32 and latents u of rows (N, heads, S, bytes), in their scales.
    """
    N, heads, S, _ = rows.shape
    n = weights.shape[-2]
    out = weights.new_zeros(N, heads, n, layout.met_bytes)
    every = weights.new_empty(N, heads, n, 1)
    runs = out.split((layout.whole, layout.met_bytes - layout.whole), -1)
    for i in range(N):
        scaled = scratch.of("scaled", torch.float32, heads, n, S)
        torch.mul(weights[i], scale[i], out=scaled)
        torch.sum(scaled, -1, keepdim=True, out=every[i])
        numbers, unit = split(scaled, "weights")
        since = 0
        for part, met in layout.parts(rows[i], chunk):
            own, held = numbers[:, :, part], []
            for k, each in enumerate(met):
                so_far = f"sums of run {k}"
                found = sums(own, each, "sums" if since else so_far)
                if since:
                    found = scratch.of(so_far, torch.int32, *found.shape).add_(found)
                held.append(found)
            since += own.shape[-1]
            if since >= flush or part.stop == S:
                for run, found in zip(runs, held):
                    run[i].addcmul_(together(found, n), unit)
                since = 0
    return layout.of_latents(out).addcmul_(every, layout.constant)
