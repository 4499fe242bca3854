"""Forms of keys other than the joint one of factors_lrkv.py: each a class that says only how it
differs. Travels with every converted checkpoint. Their twins in the library, which fit and plan
them, are in lrkv_convert/forms.

Shapes as in factors_lrkv.py. This file may import torch, transformers and its siblings only.
"""

import torch
from torch import nn
from transformers import initialization as init

from .factors_lrkv import LowRankHeads, rotate


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
        real, imaginary = self.C.to(dtype).unsqueeze(-1).chunk(2, dim=1)  # (H, n, 1)
        at = self.frequencies(self.C.device)
        places = nn.functional.one_hot(at, self.head_dim // 2).to(dtype)  # (n, d / 2)
        of_real = torch.cat((real * places, imaginary * places), dim=-1)
        of_imaginary = torch.cat((-imaginary * places, real * places), dim=-1)
        return torch.cat((of_real, of_imaginary), dim=1)

    def rebuild(self, cached, rotation=None, norm=None):
        return self._aligned(cached[0], self.maps(self.C.dtype))

    def read_as_is(self, rotation, norm):
        return True

    def absorb(self, query):
        at, half = self.frequencies(query.device), self.head_dim // 2
        left, right = query[..., at], query[..., half + at]  # (N, H, Q, n)
        real, imaginary = self.C.to(query.dtype).unsqueeze(1).chunk(2, dim=-1)  # (H, 1, n)
        return [
            torch.cat((left * real + right * imaginary, right * real - left * imaginary), dim=-1)
        ]

    @torch.no_grad()
    def matrices(self):
        return self.W_shared.weight.T.double() @ self.maps(torch.float64)

    def reset_parameters(self):
        init.normal_(self.W_shared.weight, std=self.width**-0.5)
        init.normal_(self.C, std=(self.head_dim / (2 * self.base_width)) ** 0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


FORMS: dict[str, type[LowRankHeads]] = {
    form.form: form for form in (LowRankHeads, RotaryHeads, CommutingHeads, FullHeads)
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
    "form": str, "codes": [those of base and residual per layer, if there are any]}, "values":
    {...}}, and lists of what a form has `found`.
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
        **{name: spec[name][layer_idx] for name in ("codes", *form.found) if name in spec},
    )
