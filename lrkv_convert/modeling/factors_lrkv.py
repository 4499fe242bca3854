"""Low-Rank Key-Value heads: the module that replaces k_proj and v_proj. Travels with every
converted checkpoint.

Each KV head h of a layer computes, for keys and for values alike (O'Neill et al., "Low-Rank Key
Value Attention", arXiv 2601.11471, Eq 2-5),

    K_h = s C_h + R_h B_h^T + b_h        s = x W_shared (m numbers, one for all heads)       R_h = x
                                         U_h (r numbers per head)

and caches only s and R_h: m + H r numbers per token instead of H d. C_h is an alignment map
(weights, never cached); the paper's own form is m = d and C_h = I. A base may also be shared in
groups of neighbouring heads only (as in Palu, arXiv 2407.21118), which then have one each. Keys are
cached before RoPE: the rotation does not commute with B_h, so a key is rebuilt first and rotated
afterwards. Other forms of keys are in forms_lrkv.py.

What is cached is used in two ways, equal up to rounding: `rebuild` materialises K_h or V_h (Eq
4-5); `scores` and `average` read it in place (Eq 6-7).

Slots may hold codes in place of 16-bit numbers (codes_lrkv.py): rows of bytes, which give as many
latents and one more, the mark of sinks, that the maps take to what those have in addition.

Shapes: N batch, T tokens, S cached tokens, H KV heads, G query heads per KV head, Q = G T queries
per KV head, D model width, d head width, m base width, r residual rank. This file may import torch,
transformers and codes_lrkv.py only.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from .codes_lrkv import Blocks, Codes
from .integer_lrkv import reads

# numbers rebuilt at once where keys are only read: they then stay in a core's cache (64 times as
# many on a GPU, which has more)
CHUNK = 1 << 19


class LowRankHeads(nn.Module):
    """Keys or values of all KV heads of one layer, in factored form; the class of the joint form,
    and what other forms differ from.

    Args: width D, num_heads H, head_dim d, base_width m >= 0, rank r >= 0 (m + r > 0), alignment
    (whether C is there; without it m must be d or 0), bias (whether b is there), codes (of base and
    of residual: pairs of bits and latents, or None for 16-bit numbers), groups g (of heads that
    share a base). Raises ValueError when these do not fit together.

    What it caches is a tuple of tensors, one for each of its `slots`; here base (N, g, T, m) and
    residual (N, H, T, r).
    """

    form = "joint"
    # arguments of the constructor that a fit finds: of what the config says of a layer, beside its
    # sizes
    found: tuple[str, ...] = ()
    has_maps = True  # whether there may be maps C
    kernel_reads = True  # whether the kernel can read it, where all heads share a base
    # of keys under RoPE: whether any is rotated when it is read (by its index in the cache), and
    # whether any lies rotated in the cache
    rotates_on_read, caches_rotated = True, False

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        base_width: int,
        rank: int,
        alignment: bool,
        bias: bool,
        codes: Sequence[Blocks | None] | None = None,
        groups: int = 1,
    ):
        super().__init__()
        if base_width < 0 or rank < 0 or base_width + rank == 0:
            raise ValueError(
                f"LRKV needs base_width >= 0, rank >= 0 and one of them positive, got {base_width}"
                f" and {rank}"
            )
        if not alignment and base_width not in (0, head_dim):
            raise ValueError(
                f"without alignment maps the base must be as wide as a head ({head_dim}), got"
                f" {base_width}"
            )
        if groups < 1 or num_heads % groups or (groups > 1 and not (alignment and base_width)):
            raise ValueError(f"{num_heads} heads do not share bases in {groups} groups")
        self.width, self.num_heads, self.head_dim, self.base_width, self.rank, self.groups = (
            width,
            num_heads,
            head_dim,
            base_width,
            rank,
            groups,
        )
        # whether the kernel can read it
        self.in_kernel = self.kernel_reads and groups == 1
        # weight (g m, D), group-major
        self.W_shared = nn.Linear(width, groups * base_width, bias=False) if base_width else None
        self.C = (
            nn.Parameter(torch.empty(num_heads, base_width, head_dim))
            if base_width and alignment
            else None
        )
        # weight (H r, D), head-major
        self.U = nn.Linear(width, num_heads * rank, bias=False) if rank else None
        self.B = nn.Parameter(torch.empty(num_heads, head_dim, rank)) if rank else None
        self.base_codes, self.residual_codes = (
            None if blocks is None else Codes(blocks, size, heads, num_heads, head_dim)
            for blocks, size, heads in zip(
                codes or (None, None), (base_width, rank), (groups, num_heads), strict=True
            )
        )
        if self.base_codes is not None and self.C is None:
            raise ValueError("codes of the base need alignment maps")
        # codes are taken about a centre: what lies there is in the bias
        bias = bias or self.coded
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim)) if bias else None

    @property
    def coders(self) -> tuple[Codes | None, ...]:
        """What makes codes of each slot, None where it holds numbers."""
        return self.base_codes, self.residual_codes

    @property
    def coded(self) -> bool:
        return any(coder is not None for coder in self.coders)

    def refuse(self, alignment: bool) -> None:
        """Raise ValueError for sizes that the form cannot have."""
        raise ValueError(
            f"form {self.form!r} does not go with base_width {self.base_width}, rank {self.rank}"
            f" and alignment {alignment}"
        )

    def refuse_codes(self, codes: Sequence[Blocks | None] | None) -> None:
        """Raise ValueError for codes, in a form that has none."""
        if any(codes or ()):
            raise ValueError(f"form {self.form!r} has no codes")

    def extra_repr(self) -> str:
        return (
            f"form={self.form}, heads={self.num_heads}, head_dim={self.head_dim},"
            f" base_width={self.base_width}, rank={self.rank}"
        )

    def latents(self) -> list[tuple[int, int]]:
        """(heads, width) of each slot, 1 head for what all share."""
        return [(self.groups, self.base_width), (self.num_heads, self.rank)]

    def slots(self) -> list[tuple[int, int]]:
        """(heads, width) of each tensor that a token caches: numbers, or bytes where they are
        codes. A slot of no width is not cached; those at one place of keys and of values have the
        same heads.
        """
        return [
            (heads, width if coder is None else coder.bytes)
            for (heads, width), coder in zip(self.latents(), self.coders)
        ]

    def encode(
        self,
        x: torch.Tensor,
        rotation: tuple | None = None,
        norm: nn.Module | None = None,
        through: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """x (N, T, D) -> what the cache holds: a tensor (N, heads, T, width) for each slot.

        rotation: (cos, sin) of these T tokens, for keys under RoPE; norm: the QK-norm of keys,
        before rotation; through: nothing is to be cached, so that where there are codes their
        values will do, through which gradients pass.
        """
        return tuple(
            z if coder is None else coder.through(z).to(z.dtype) if through else coder.pack(z)
            for z, coder in zip(self.project(x, rotation, norm), self.coders)
        )

    def read(self, cached: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> list:
        """What is cached -> latents of each slot, (N, heads, S, width), of codes with the mark of
        sinks; dtype: of the latents, default that of the maps.
        """
        return [
            coder.read(held, dtype or self.dtype)
            if coder is not None
            else held
            if dtype is None
            else held.to(dtype)
            for held, coder in zip(cached, self.coders)
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def base_maps(self) -> torch.Tensor | None:
        """C (H, m, d) as latents of the base are read with it: of codes with a row for sinks. None
        for the identity.
        """
        if self.base_codes is None:
            return self.C
        return torch.cat((self.C, self.base_codes.lift.unsqueeze(1)), dim=1)

    def residual_maps(self) -> torch.Tensor:
        """B^T (H, r, d), of codes with a row for sinks."""
        if self.residual_codes is None:
            return self.B.mT
        return torch.cat((self.B.mT, self.residual_codes.lift.unsqueeze(1)), dim=1)

    def project(
        self, x: torch.Tensor, rotation: tuple | None = None, norm: nn.Module | None = None
    ) -> tuple[torch.Tensor, ...]:
        """x (N, T, D) -> latents, a tensor (N, heads, T, width) for each slot."""
        N, T, _ = x.shape
        base = (
            self.W_shared(x).view(N, T, self.groups, self.base_width).transpose(1, 2)
            if self.W_shared is not None
            # (N, g, T, m)
            else x.new_empty(N, self.groups, T, 0)
        )
        residual = (
            self.U(x).view(N, T, self.num_heads, self.rank).transpose(1, 2)
            if self.U is not None
            # (N, H, T, r)
            else x.new_empty(N, self.num_heads, T, 0)
        )
        return base, residual

    def rebuild(
        self,
        cached: tuple[torch.Tensor, ...],
        rotation: tuple | None = None,
        norm: nn.Module | None = None,
    ) -> torch.Tensor:
        """What is cached -> keys, or values, (N, H, S, d) (Eq 4-5). rotation: (cos, sin) of all
        cached tokens.
        """
        base, residual = self.read(cached)
        shared = None
        if self.W_shared is not None:
            C = self.base_maps()
            shared = base if C is None else self._aligned(base, C)  # (N, 1 or H, S, d)
        return self._finished(shared, residual, rotation, norm).expand(-1, self.num_heads, -1, -1)

    def _finished(
        self,
        shared: torch.Tensor | None,
        residual: torch.Tensor,
        rotation: tuple | None,
        norm: nn.Module | None,
    ) -> torch.Tensor | None:
        """Heads (N, 1 or H, S, d) with their residuals and biases, normalised and rotated; None
        where nothing is there.
        """
        heads = shared
        if self.U is not None:
            own = residual @ self.residual_maps()  # (N, H, S, d)
            heads = own if heads is None else heads + own
        if self.bias is not None:
            bias = self.bias.unsqueeze(1).to(residual.dtype)  # (H, 1, d)
            heads = (
                bias.expand(len(residual), -1, residual.shape[2], -1)
                if heads is None
                else heads + bias
            )
        if heads is not None and norm is not None:
            heads = norm(heads)
        if heads is not None and rotation is not None:
            heads = rotate(heads, rotation)
        return heads

    def read_as_is(self, rotation: tuple | None, norm: nn.Module | None) -> bool:
        """Whether queries that absorb the maps meet what is cached as it lies there."""
        return rotation is None and norm is None

    def absorb(self, query: torch.Tensor) -> list[torch.Tensor | None]:
        """Queries (N, H, Q, d) with the maps in them, (N, H, Q, width) for each slot, None for one
        of no width (Eq 6). The maps may be less precise than the queries.
        """
        shared = own = None
        if self.W_shared is not None:
            C, coder = self.C, self.base_codes
            shared = query if C is None else query @ C.mT.to(query.dtype)
            shared = shared if coder is None else _beside(shared, query, coder.lift)
        if self.U is not None:
            B, coder = self.B, self.residual_codes
            own = query @ B.to(query.dtype)
            own = own if coder is None else _beside(own, query, coder.lift)
        return [shared, own]

    def scores(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, ...],
        rotation: tuple | None = None,
        norm: nn.Module | None = None,
    ) -> torch.Tensor:
        """q K^T (N, H, Q, S) of queries (N, H, Q, d), rotated where keys are, without a copy of K
        (Eq 6).

        A bias of keys without rotation and norm is left out: it shifts all scores of a query alike,
        which the softmax ignores. Keys that must be rotated or normalised are rebuilt, a chunk of
        tokens at a time. Query and cached may be more precise than the maps.
        """
        if self.read_as_is(rotation, norm):
            return self._met(query, cached)
        ready, maps = None, {}
        # one base for all heads: rotated once
        if self.W_shared is not None and norm is None and self.C is None:
            ready = _scores(query, self._turned(cached[0].to(query.dtype), rotation))
        elif self.W_shared is not None:
            C = self.base_maps()
            identity = torch.eye(self.head_dim).to(query).expand(self.num_heads, -1, -1)
            maps[0] = identity if C is None else C.to(query.dtype)
        if self.U is not None:
            maps[1] = self.residual_maps().to(query.dtype)  # (H, r, d)
        if not maps and self.bias is None:
            return ready
        rebuilt = self._rebuilt_scores(query, cached, maps, rotation, norm)
        return rebuilt if ready is None else ready + rebuilt

    def _met(self, query: torch.Tensor, cached: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Scores of queries against what is cached, as it lies there."""
        absorbed, out = self.absorb(query), []
        for part in self._chunks(cached, query.device, self._unpacks(cached, query)):
            parts = [
                _scores(q, held[:, :, part], coder)
                for q, held, coder in zip(absorbed, cached, self.coders)
                if q is not None
            ]
            total = parts.pop()
            for more in parts:
                total = total.add_(more)
            out.append(total)
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def _unpacks(self, cached: tuple[torch.Tensor, ...], beside: torch.Tensor) -> bool:
        """Whether codes become numbers to be met by others."""
        return any(
            coder is not None and not reads(held, beside)
            for held, coder in zip(cached, self.coders)
        )

    def _chunks(self, cached: tuple, device: torch.device, cut: bool) -> list[slice]:
        """Parts of what is cached, in tokens, few enough to be rebuilt at once. cut: whether
        anything is.
        """
        length = cached[0].shape[2]
        if not cut or torch.compiler.is_compiling():
            return [slice(0, length)]
        numbers = CHUNK if device.type == "cpu" else 64 * CHUNK
        step = max(1, numbers // (self.num_heads * self.head_dim))
        return [slice(i, i + step) for i in range(0, length, step)] or [slice(0, 0)]

    def _part(self, cached: tuple, part: slice, dtype: torch.dtype) -> list[torch.Tensor]:
        """Latents of some of the tokens."""
        return self.read(tuple(held[:, :, part] for held in cached), dtype)

    def _turned(self, base: torch.Tensor, rotation: tuple) -> torch.Tensor:
        """A base (N, 1, S, d) as queries meet it."""
        return rotate(base, rotation)

    def average(self, weights: torch.Tensor, cached: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """a V (N, H, Q, d) of attention weights (N, H, Q, S) that sum to one, without a copy of V
        (Eq 7).
        """
        averages: list[torch.Tensor | None] = [None] * len(cached)
        for part in self._chunks(cached, weights.device, self._unpacks(cached, weights)):
            for i, ((_, width), coder) in enumerate(zip(self.latents(), self.coders)):
                if width:
                    own = _averages(weights[..., part], cached[i][:, :, part], coder)
                    so_far = averages[i]
                    averages[i] = own if so_far is None else so_far + own
        return self.expand_averages(averages)

    def expand_averages(self, averages: list[torch.Tensor | None]) -> torch.Tensor:
        """Averages (N, H, Q, width) of each slot, None for one of no width -> averages of values
        (N, H, Q, d).
        """
        parts = []
        for latents, maps, coder in zip(
            averages, (self.C, None if self.B is None else self.B.mT), self.coders
        ):
            if latents is None:
                continue
            if coder is not None:
                latents, sinks = latents[..., :-1], latents[..., -1:]
                parts.append(sinks * coder.lift.unsqueeze(1).to(sinks.dtype))
            parts.append(latents if maps is None else latents @ maps.to(latents.dtype))
        if self.bias is not None:
            parts.append(self.bias.unsqueeze(1).to(parts[0].dtype))
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def matrices(self) -> torch.Tensor:
        """What the factors stand for, (H, D, d) float64: W_shared C_h + U_h B_h^T, whatever is
        cached of it.
        """
        device = next(self.parameters()).device
        size = self.num_heads, self.width, self.head_dim
        W = torch.zeros(size, dtype=torch.float64, device=device)
        if self.W_shared is not None:
            base = self.W_shared.weight.T.double().view(self.width, self.groups, -1)
            base = base.transpose(0, 1).repeat_interleave(self.num_heads // self.groups, dim=0)
            W += base if self.C is None else base @ self.C.double()  # (H, D, m) of its group
        if self.U is not None:
            U = self.U.weight.double().view(self.num_heads, self.rank, self.width).mT  # (H, D, r)
            W += U if self.B is None else U @ self.B.double().mT
        return W

    def _rebuilt_scores(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, ...],
        maps: dict[int, torch.Tensor],
        rotation: tuple | None,
        norm: nn.Module | None,
    ) -> torch.Tensor:
        """Scores of keys sum latent @ map + b, maps {slot: (H, n, d)}, rebuilt chunk by chunk.

        With one query per KV head the query goes into the maps, so that nothing is rotated: q
        Rot(t) k = sum_j cos_j(t) (q1 k1 + q2 k2)_j + sin_j(t) (q2 k1 - q1 k2)_j, with 1 and 2 the
        halves that RoPE pairs: one product and one dot with the table of cosines and sines.
        """
        length = cached[0].shape[2]
        # (1, H, 1, d)
        bias = None if self.bias is None else self.bias[None, :, None].to(query.dtype)
        folded = norm is None and query.shape[2] == 1
        table = None
        if folded:
            # (N, H, n, d)
            maps = {i: _fold(matrix, query, rotation) for i, matrix in maps.items()}
            bias = None if bias is None else _fold(bias, query, rotation)
            table = _table(rotation, self.head_dim).unsqueeze(1)  # (1 or N, 1, S, d)
        out = []
        for part in self._chunks(cached, query.device, True):
            latents = self._part(cached, part, query.dtype)
            pieces = [_mapped(latents[i], matrix) for i, matrix in maps.items()]
            pieces += [bias] if bias is not None else []
            keys = sum(pieces[1:], pieces[0])  # (N, H, step, d)
            if table is not None:
                out.append((keys * table[:, :, part]).sum(-1).unsqueeze(2))  # (N, H, 1, step)
                continue
            keys = keys if norm is None else norm(keys)
            out.append(
                _scores(query, keys)
                if rotation is None
                else _rotated_scores(query, keys, tuple(t[:, part].unsqueeze(1) for t in rotation))
            )
        out = out[0] if len(out) == 1 else torch.cat(out, dim=-1)
        # bias alone has no tokens of its own
        return out.expand(-1, -1, -1, length)

    def _aligned(self, base: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """s C_h for all heads in one product a group: (N, g, T, m) and (H, m, d) -> (N, H, T,
        d).
        """
        N, g, T, _ = base.shape
        C = C.unflatten(0, (g, -1)).transpose(1, 2).flatten(2)  # (g, m, H / g d)
        heads = (base @ C).view(N, g, T, -1, self.head_dim).transpose(2, 3)
        return heads.flatten(1, 2)

    def reset_parameters(self) -> None:
        """The paper's start from scratch: Kaiming base; U, B random with |U_h B_h^T| about a tenth
        of the base (Sec 3).
        """
        std = 1 / math.sqrt(self.width)
        if self.W_shared is not None:
            init.normal_(self.W_shared.weight, std=std)
        if self.C is not None:
            init.copy_(
                self.C, torch.eye(self.base_width, self.head_dim).expand(self.num_heads, -1, -1)
            )
        if self.U is not None:
            init.normal_(self.U.weight, std=std * math.sqrt(0.1))
        if self.B is not None:
            init.normal_(self.B, std=math.sqrt(0.1 / self.rank))
        if self.bias is not None:
            init.zeros_(self.bias)
        for coder in self.coders:
            if coder is not None:
                init.zeros_(coder.centres)
                init.zeros_(coder.lift)


# --------------------------------------------------------------------------------------------- RoPE


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE in the half-split layout of transformers: x (N, heads, T, d), cos and sin (1 or N, T,
    d), or narrower: then only the first channels turn. Tables may be more precise than x.
    """
    cos, sin = (t.unsqueeze(1) for t in rotation)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _fold(matrix: torch.Tensor, query: torch.Tensor, rotation: tuple) -> torch.Tensor:
    """Maps (H, n, d) with one query (N, H, 1, d) multiplied in, for `_table`: (N, H, n, d)."""
    half = rotation[0].shape[-1] // 2
    (q1, q2, q3), (m1, m2, m3) = (
        t.split((half, half, t.shape[-1] - 2 * half), dim=-1) for t in (query, matrix)
    )
    return torch.cat((m1 * q1 + m2 * q2, m1 * q2 - m2 * q1, m3 * q3), dim=-1)


def _table(rotation: tuple, head_dim: int) -> torch.Tensor:
    """cos, sin (1 or N, S, at most d) -> [cos | sin | 1] (1 or N, S, d), each angle once."""
    cos, sin = rotation
    half = cos.shape[-1] // 2
    return torch.cat(
        (
            cos[..., :half],
            sin[..., :half],
            torch.ones_like(cos[..., :1]).expand(*cos.shape[:-1], head_dim - 2 * half),
        ),
        dim=-1,
    )


def _rotated_scores(query: torch.Tensor, keys: torch.Tensor, rotation: tuple) -> torch.Tensor:
    """Queries (N, H, Q, d) against keys (N, H, S, d) to be rotated first, cos and sin (1 or N, 1,
    S, at most d): half by half, without a copy of the whole.
    """
    half = rotation[0].shape[-1] // 2
    cos, sin = (t[..., :half] for t in rotation)
    (q1, q2, q3), (k1, k2, k3) = (
        t.split((half, half, t.shape[-1] - 2 * half), dim=-1) for t in (query, keys)
    )
    k1, k2 = torch.addcmul(k1 * cos, k2, sin, value=-1), torch.addcmul(k2 * cos, k1, sin)
    scores = _scores(q1, k1.to(q1.dtype)) + _scores(q2, k2.to(q2.dtype))
    return scores + _scores(q3, k3) if k3.shape[-1] else scores


def _scores(query: torch.Tensor, latents: torch.Tensor, coder: Codes | None = None) -> torch.Tensor:
    """Queries (N, H, Q, w) against latents (N, g, S, w) of g groups of heads, each shared in its
    group: (N, H, Q, S), as one product a group that reads them once. coder: of latents that are
    rows of codes. Tokens come first in the product: a CPU reads them faster so.
    """
    N, H, Q, w = query.shape
    query = query.reshape(N, latents.shape[1], -1, w)
    if coder is None:
        met = (latents.to(query.dtype) @ query.mT).mT
    else:
        met = coder.dot(query, latents)
    return met.reshape(N, H, Q, -1)


def _averages(
    weights: torch.Tensor, latents: torch.Tensor, coder: Codes | None = None
) -> torch.Tensor:
    """Latents, as in `_scores`, averaged with weights (N, H, Q, S): (N, H, Q, w), of codes with the
    mark of sinks.
    """
    N, H, Q, S = weights.shape
    weights = weights.reshape(N, latents.shape[1], -1, S)
    average = weights @ latents if coder is None else coder.mix(weights, latents)
    return average.view(N, H, Q, -1)


def _mapped(latents: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Latents, as in `_scores`, times the maps of each head (H, w, n) or (N, H, w, n): (N, H, S,
    n).
    """
    g = latents.shape[1]
    if g in (1, maps.shape[-3]):
        return latents @ maps
    return (latents.unsqueeze(2) @ maps.unflatten(-3, (g, -1))).flatten(1, 2)


def _beside(absorbed: torch.Tensor, query: torch.Tensor, lift: torch.Tensor) -> torch.Tensor:
    """Queries with maps in them (N, H, Q, w), and behind them with what sinks have more (H, d)."""
    return torch.cat((absorbed, query @ lift.unsqueeze(-1).to(query.dtype)), dim=-1)
