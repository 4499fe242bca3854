"""What every decode path computes, as slowly and plainly as it can be written: the specification of
kernel_lrkv.py and of the split path.
"""

import torch


def decode(
    keys,
    values,
    query: torch.Tensor,
    cached_keys: tuple,
    cached_values: tuple,
    rotation: tuple | None,
    mask: torch.Tensor | None,
    scale: float,
    norm=None,
) -> torch.Tensor:
    """Arguments and result as in `kernel_lrkv.decode`, in float64: for each row and head, rebuild,
    normalise, rotate, softmax, average. Codes are taken apart first.
    """
    N, H, G, d = query.shape
    of_keys, of_values = _latents(keys, cached_keys), _latents(values, cached_values)
    out = torch.empty(N, H, G, d, dtype=torch.float64, device=query.device)
    for n in range(N):
        for h in range(H):
            k = KEYS[keys.form](
                keys, _held(of_keys, n, h, H), h, lambda k: _turned(k, n, rotation, norm)
            )
            v = _head(values, _held(of_values, n, h, H), h)
            # (G, S)
            scores = query[n, h].double() @ k.T * scale
            if mask is not None:
                scores = scores + _double(mask)[min(n, len(mask) - 1), 0, 0]
            out[n, h] = scores.softmax(-1) @ v
    return out


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


def _latents(side, cached: tuple) -> list[torch.Tensor]:
    """What is cached -> latents of each slot (N, heads, S, width); those that were codes have the
    mark of sinks behind them.
    """
    return [
        _decoded(held, coder.blocks) if held.dtype == torch.uint8 else _double(held)
        for held, coder in zip(cached, side.coders)
    ]


# bits of a code -> the planes in which they lie, high bits first
PLANES = {8: [8], 6: [4, 2], 4: [4], 3: [2, 1], 2: [2]}


def _decoded(rows: torch.Tensor, blocks) -> torch.Tensor:
    """Rows of bytes (N, heads, S, bytes) -> latents and the mark of sinks (N, heads, S, w + 1), bit
    by bit as codes_lrkv.py says in words. blocks: (bits, how many latents), most bits first.
    """

    def byte(i: int) -> torch.Tensor:
        return rows[..., i].long()  # (N, heads, S)

    # float16, never so small that it has no leading bit: sign, 5 bits of exponent, 10 of fraction
    word = byte(0) | byte(1) << 8
    sink, exponent, fraction = word >> 15, word >> 10 & 31, word & 1023
    t = (1024 + fraction) * 2.0 ** (exponent.double() - 25)
    # a plane holds its bits of all codes that have some there: a byte has those of several codes,
    # which are as far apart as the plane has bytes
    size = {
        plane: sum(count for bits, count in blocks if plane in PLANES[bits]) * plane // 8
        for plane in (8, 4, 2, 1)
    }
    start, at = {}, 2
    for plane in size:
        start[plane], at = at, at + size[plane]
    latents, seen = [], dict.fromkeys(size, 0)
    for bits, count in blocks:
        for i in range(count):
            code = torch.zeros_like(word)
            for plane in PLANES[bits]:
                part, place = divmod(seen[plane] + i, size[plane])
                # the first bit of a byte of codes is inverted
                piece = (byte(start[plane] + place) ^ 128) >> plane * part & (2**plane - 1)
                code = code << plane | piece
            latents.append(t * ((code + 0.5) / 2 ** (bits - 1) - 1))
        for plane in PLANES[bits]:
            seen[plane] += count
    return torch.stack((*latents, sink.double()), dim=-1)


def _held(cached: list, n: int, h: int, H: int) -> list[torch.Tensor]:
    """What is cached of a row and of head h of H, (S, width) for each slot; of one that heads share
    the same.
    """
    return [slot[n, h * slot.shape[1] // H] for slot in cached]


def _turned(k: torch.Tensor, n: int, rotation: tuple | None, norm) -> torch.Tensor:
    """Keys (S, d) of row n, normalised and rotated."""
    if norm is not None:
        size = (k.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        k = k / size * _double(norm.weight)
    if rotation is None:
        return k
    cos, sin = (_double(t)[min(n, len(t) - 1)] for t in rotation)  # (S, at most d)
    half = cos.shape[-1] // 2
    k1, k2, rest = k.split((half, half, k.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos[:, :half], sin[:, :half]
    return torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin, rest), dim=-1)


def _joint_key(keys, held: list, h: int, turn) -> torch.Tensor:
    """Rebuilt, then turned."""
    return turn(_head(keys, held, h))


def _rotary_key(keys, held: list, h: int, turn) -> torch.Tensor:
    """The base lies there as it is to be read."""
    base, own = held
    key = turn(_head(keys, [base[:, :0], own], h))
    return key + base if base.shape[-1] else key


def _full_key(keys, held: list, h: int, turn) -> torch.Tensor:
    return held[1]


def _commuting_key(keys, held: list, h: int, turn) -> torch.Tensor:
    """Latent after latent, each a complex number that goes to the channel pair of its frequency."""
    z, c = (torch.complex(*t.chunk(2, dim=-1)) for t in (held[0], _double(keys.C)[h]))
    key = torch.zeros(len(z), keys.head_dim // 2, dtype=z.dtype, device=z.device)
    places = [j for j, count in enumerate(keys.kept) for _ in range(count)]
    for a, j in enumerate(places):
        key[:, j] += c[a] * z[:, a]
    return torch.cat((key.real, key.imag), dim=-1)


# form -> the keys (S, d) of one head out of what is cached of it
KEYS = {
    "joint": _joint_key,
    "rotary": _rotary_key,
    "commuting": _commuting_key,
    "full": _full_key,
}


def _head(side, held: list[torch.Tensor], h: int) -> torch.Tensor:
    """s C_h + R_h B_h^T + b_h: base (S, m), own (S, r) -> (S, d). Those of codes have one column
    more, which says where sinks are, and those have `lift` in addition.
    """
    base, own = held
    head = torch.zeros(len(base), side.head_dim, dtype=torch.float64, device=base.device)
    for latents, coder, maps in (
        (base, side.base_codes, None if side.C is None else _double(side.C)[h]),
        (own, side.residual_codes, None if side.B is None else _double(side.B)[h].T),
    ):
        if coder is not None:
            latents, sink = latents[:, :-1], latents[:, -1:]
            head = head + sink * _double(coder.lift)[h]
        if latents.shape[-1]:
            head = head + (latents if maps is None else latents @ maps)
    return head if side.bias is None else head + _double(side.bias)[h]
