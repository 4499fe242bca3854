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
    normalise, rotate, softmax, average.
    """
    N, H, G, d = query.shape
    out = torch.empty(N, H, G, d, dtype=torch.float64, device=query.device)
    for n in range(N):
        for h in range(H):
            k = KEYS[keys.form](
                keys, _held(cached_keys, n, h), h, lambda k: _turned(k, n, rotation, norm)
            )
            v = _head(values, _held(cached_values, n, h), h)
            # (G, S)
            scores = query[n, h].double() @ k.T * scale
            if mask is not None:
                scores = scores + _double(mask)[min(n, len(mask) - 1), 0, 0]
            out[n, h] = scores.softmax(-1) @ v
    return out


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


def _held(cached: tuple, n: int, h: int) -> list[torch.Tensor]:
    """What is cached of a row and a head, (S, width) for each slot; of one for all heads the
    same.
    """
    return [_double(slot)[n, min(h, slot.shape[1] - 1)] for slot in cached]


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
    """s C_h + R_h B_h^T + b_h: base (S, m), own (S, r) -> (S, d)."""
    base, own = held
    head = torch.zeros(len(base), side.head_dim, dtype=torch.float64, device=base.device)
    if base.shape[-1]:
        head = head + (base if side.C is None else base @ _double(side.C)[h])
    if own.shape[-1]:
        head = head + own @ _double(side.B)[h].T
    return head if side.bias is None else head + _double(side.bias)[h]
