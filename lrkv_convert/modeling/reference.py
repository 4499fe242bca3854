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
    double = lambda t: None if t is None else t.detach().double()
    N, H, G, d = query.shape
    (base, own), (v_base, v_own) = (
        [double(t) for t in side] for side in (cached_keys, cached_values)
    )
    out = torch.empty(N, H, G, d, dtype=torch.float64, device=query.device)
    for n in range(N):
        for h in range(H):
            # (S, d)
            k = (
                own[n, h]
                if keys.form == "full"
                else _head(keys, base[n, 0], own[n, h], h, with_base=keys.form == "joint")
            )
            if keys.form != "full":
                if norm is not None:
                    k = (
                        k
                        / (k.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
                        * double(norm.weight)
                    )
                if rotation is not None:
                    # (S, at most d)
                    cos, sin = (double(t)[min(n, len(t) - 1)] for t in rotation)
                    half = cos.shape[-1] // 2
                    k1, k2, rest = k.split((half, half, d - 2 * half), dim=-1)
                    k = torch.cat(
                        (
                            k1 * cos[:, :half] - k2 * sin[:, :half],
                            k2 * cos[:, :half] + k1 * sin[:, :half],
                            rest,
                        ),
                        dim=-1,
                    )
                if keys.form == "rotary" and base.shape[-1]:
                    k = k + base[n, 0]
            v = (
                v_own[n, h]
                if values.form == "full"
                else _head(values, v_base[n, 0], v_own[n, h], h)
            )
            # (G, S)
            scores = query[n, h].double() @ k.T * scale
            if mask is not None:
                scores = scores + double(mask)[min(n, len(mask) - 1), 0, 0]
            out[n, h] = scores.softmax(-1) @ v
    return out


def _head(
    side, base: torch.Tensor, own: torch.Tensor, h: int, with_base: bool = True
) -> torch.Tensor:
    """s C_h + R_h B_h^T + b_h: base (S, m), own (S, r) -> (S, d)."""
    head = torch.zeros(len(base), side.head_dim, dtype=torch.float64, device=base.device)
    if base.shape[-1] and with_base:
        head = head + (base if side.C is None else base @ side.C[h].detach().double())
    if own.shape[-1]:
        head = head + own @ side.B[h].detach().double().T
    return head if side.bias is None else head + side.bias[h].detach().double()
