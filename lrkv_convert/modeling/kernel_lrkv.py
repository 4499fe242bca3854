"""Decoding with factored keys and values, fused, in Triton: the kernel path. Travels with every
converted checkpoint; `reference.py` in the package is its specification.

One decode step of one layer is three launches, split over the cached sequence in chunks:

    scores     q K^T. Keys without position, or cached whole: Eq 6 of arXiv 2601.11471 on what is
               cached. Keys under RoPE: [base | residual] times
               [C; B^T] on the tensor cores, norm and rotation on chip, and the dot product; a key
               never reaches memory
    values     softmax-weighted sums of base and residual apart (Eq 7), partial per chunk
    combine    the chunks' sums, put on one scale

Scores pass through memory (4 bytes per token and query head, written once and read by each block of
columns: some 5 % of what a half cache of 32 heads moves, more with grouped queries): in return a
base of any width goes through in column blocks, which one fused loop could not hold in registers.
Every cached number is read once from memory: the base tile serves all heads of a block, and further
blocks of the same chunk find it in L2. The products with C and B^T that remain (one row per query)
are left to torch.

Shapes: N batch, S cached tokens, H KV heads, G query heads per KV head, d head width, m base width,
r residual rank. Rows are query heads, H G.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch alone decodes as well: the split path
    triton = None

ROWS = 16  # query heads per program: the smallest tile of the tensor cores
TOKENS = 64  # cached tokens per tile
PROGRAMS = 528  # aimed at per launch: four per multiprocessor of an H100
# TRITON_INTERPRET=1: kernels run on a CPU, slowly, to be tested
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
LOWEST = -3.4028234663852886e38  # float32; finite, so that a masked chunk gives no NaN


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernel lacks on this device and for this type, or None if it can run."""
    if triton is None:
        return "Triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16) and not (
        INTERPRETED and dtype == torch.float32
    ):
        # float32 tiles of a rebuilt key do not fit the registers
        return f"it computes in half precision, not in {dtype}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton has no {device.type} backend here"
    if (
        torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "this GPU is older than compute capability 8.0, where it spills"
    return None


if triton is not None:

    @triton.jit
    def _dot(a, b, accumulator, PRECISION: tl.constexpr):
        """a b + accumulator in float32. "widen" is for the interpreter, which takes bfloat16 for
        integers.
        """
        if PRECISION == "widen":
            return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
        return tl.dot(a, b, accumulator, input_precision=PRECISION)

    @triton.jit
    def _running(top, total, scores):
        """Softmax statistics (ROWS,) of one more tile of scores (ROWS, TOKENS)."""
        higher = tl.maximum(top, tl.max(scores, 1))
        return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)

    @triton.jit
    def direct_scores(
        q_base,
        q_own,
        base,
        own,
        mask,
        scores,
        tops,
        totals,
        S,
        scale,
        base_n,
        own_n,
        own_h,
        mask_n,
        heads,
        H: tl.constexpr,
        G: tl.constexpr,
        HB: tl.constexpr,
        m: tl.constexpr,
        r: tl.constexpr,
        MB: tl.constexpr,
        RP: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        CHUNK: tl.constexpr,
        MASKED: tl.constexpr,
        PRECISION: tl.constexpr,
        LOWEST: tl.constexpr,
    ):
        """Eq 6: q_base (N, H G, m), q_own (N, H G, r), base (N, S, m), own (N, H, S, r) -> scores
        (N, H G, S), and per chunk their maximum and sum of exponentials (N, H G, chunks).
        """
        c, b, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        rows = tl.arange(0, ROWS)
        row, there = b * HB * G + rows, (rows < HB * G) & (b * HB * G + rows < H * G)
        o_m, o_r, head = tl.arange(0, MB), tl.arange(0, RP), rows // G
        top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
        if r > 0:
            # (ROWS, RP)
            b_qr = tl.load(
                q_own + (n * heads + row[:, None]) * r + o_r[None, :],
                there[:, None] & (o_r[None, :] < r),
                0.0,
            )
        for start in range(0, CHUNK, TOKENS):
            o_t = c * CHUNK + start + tl.arange(0, TOKENS)
            inside = o_t < S
            b_s = tl.zeros((ROWS, TOKENS), tl.float32)
            if m > 0:
                for j in tl.static_range(0, m, MB):
                    col = j + o_m
                    # (ROWS, MB)
                    b_q = tl.load(
                        q_base + (n * heads + row[:, None]) * m + col[None, :],
                        there[:, None] & (col[None, :] < m),
                        0.0,
                    )
                    # (TOKENS, MB)
                    b_b = tl.load(
                        base + n * base_n + o_t[:, None].to(tl.int64) * m + col[None, :],
                        inside[:, None] & (col[None, :] < m),
                        0.0,
                    )
                    b_s = _dot(b_q, tl.trans(b_b), b_s, PRECISION)
            if r > 0:
                for i in range(HB):
                    h = b * HB + i
                    held = o_t < tl.where(h < H, S, 0)  # none of a head beyond the last
                    b_own = tl.load(
                        own
                        + n * own_n
                        + h.to(tl.int64) * own_h
                        + o_t[:, None].to(tl.int64) * r
                        + o_r[None, :],
                        # (TOKENS, RP)
                        held[:, None] & (o_r[None, :] < r),
                        0.0,
                    )
                    b_s = _dot(
                        tl.where(head[:, None] == i, b_qr, 0.0).to(b_own.dtype),
                        tl.trans(b_own),
                        b_s,
                        PRECISION,
                    )
            b_s *= scale
            if MASKED:
                b_s += tl.load(mask + n * mask_n + o_t, inside, 0.0)[None, :]
            tl.store(
                scores + (n * heads + row[:, None]) * S + o_t[None, :],
                b_s,
                there[:, None] & inside[None, :],
            )
            top, total = _running(top, total, tl.where(inside[None, :], b_s, float("-inf")))
        chunks = tl.num_programs(0)
        tl.store(tops + (n * heads + row) * chunks + c, top, there)
        tl.store(totals + (n * heads + row) * chunks + c, total, there)

    @triton.jit
    def _halves(
        pointer, row_stride, column_stride, rows, keep_rows, j, DR: tl.constexpr, d: tl.constexpr
    ):
        """Two tiles (rows, D2) of a matrix with d columns: the channels that RoPE pairs, then those
        that it leaves alone, split in two.
        """
        HR: tl.constexpr = DR // 2
        P: tl.constexpr = (d - DR) // 2
        if P == 0:
            one, two = j, HR + j
        else:
            one, two = tl.where(j < HR, j, DR + j - HR), tl.where(j < HR, HR + j, DR + P + j - HR)
        keep = keep_rows[:, None] & (j[None, :] < d // 2)
        at = pointer + rows[:, None].to(tl.int64) * row_stride
        return tl.load(at + one[None, :] * column_stride, keep, 0.0), tl.load(
            at + two[None, :] * column_stride, keep, 0.0
        )

    @triton.jit
    def rotated_scores(
        query,
        base,
        own,
        C,
        B,
        bias,
        gain,
        cos,
        sin,
        mask,
        scores,
        tops,
        totals,
        S,
        scale,
        eps,
        base_n,
        own_n,
        own_h,
        table_n,
        table_t,
        mask_n,
        heads,
        G: tl.constexpr,
        GP: tl.constexpr,
        m: tl.constexpr,
        r: tl.constexpr,
        d: tl.constexpr,
        DR: tl.constexpr,
        MB: tl.constexpr,
        RP: tl.constexpr,
        D2: tl.constexpr,
        TOKENS: tl.constexpr,
        CHUNK: tl.constexpr,
        BASE: tl.constexpr,
        BIASED: tl.constexpr,
        NORMED: tl.constexpr,
        ROTATED: tl.constexpr,
        MASKED: tl.constexpr,
        PRECISION: tl.constexpr,
        LOWEST: tl.constexpr,
    ):
        """Eq 4 and a dot product: query (N, H G, d), rotated; base (N, S, m), own (N, H, S, r), C
        (H, m, d), B (H, d, r), cos and sin (1 or N, S, DR) -> as `direct_scores`. One program per
        chunk and KV head.

        BASE: 0 there is none, 1 mapped by C, 2 added as it is before rotation (C = I), 3 after it
        (cached rotated).
        """
        c, h, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        o_m, o_r, j, g = tl.arange(0, MB), tl.arange(0, RP), tl.arange(0, D2), tl.arange(0, GP)
        row = h * G + g
        # (GP, D2)
        b_q1, b_q2 = _halves(query + (n * heads + h * G) * d, d, 1, g, g < G, j, DR, d)
        own += n * own_n + h.to(tl.int64) * own_h
        base += n * base_n
        every = tl.arange(0, 1)
        if r > 0:
            # (RP, D2)
            b_B1, b_B2 = _halves(B + h * d * r, 1, r, o_r, o_r < r, j, DR, d)
        if BASE == 1 and m <= MB:
            # (MB, D2)
            b_C1, b_C2 = _halves(C + h * m * d, d, 1, o_m, o_m < m, j, DR, d)
        if BIASED:
            # (1, D2)
            b_b1, b_b2 = _halves(bias + h * d, d, 1, every, every == 0, j, DR, d)
        if NORMED:
            b_g1, b_g2 = _halves(gain, d, 1, every, every == 0, j, DR, d)
        top, total = tl.full((GP,), LOWEST, tl.float32), tl.zeros((GP,), tl.float32)
        for start in range(0, CHUNK, TOKENS):
            o_t = c * CHUNK + start + tl.arange(0, TOKENS)
            inside = o_t < S
            b_k1, b_k2 = tl.zeros((TOKENS, D2), tl.float32), tl.zeros((TOKENS, D2), tl.float32)
            if BASE == 1:
                for i in tl.static_range(0, m, MB):
                    col = i + o_m
                    # (TOKENS, MB)
                    b_s = tl.load(
                        base + o_t[:, None].to(tl.int64) * m + col[None, :],
                        inside[:, None] & (col[None, :] < m),
                        0.0,
                    )
                    if m > MB:
                        b_C1, b_C2 = _halves(C + h * m * d, d, 1, col, col < m, j, DR, d)
                    b_k1 = _dot(b_s, b_C1, b_k1, PRECISION)
                    b_k2 = _dot(b_s, b_C2, b_k2, PRECISION)
            if r > 0:
                # (TOKENS, RP)
                b_own = tl.load(
                    own + o_t[:, None].to(tl.int64) * r + o_r[None, :],
                    inside[:, None] & (o_r[None, :] < r),
                    0.0,
                )
                b_k1 = _dot(b_own, b_B1, b_k1, PRECISION)
                b_k2 = _dot(b_own, b_B2, b_k2, PRECISION)
            if BASE == 2:
                b_s1, b_s2 = _halves(base, d, 1, o_t, inside, j, DR, d)
                b_k1, b_k2 = b_k1 + b_s1, b_k2 + b_s2
            if BIASED:
                b_k1, b_k2 = b_k1 + b_b1, b_k2 + b_b2
            if NORMED:
                inverse = tl.rsqrt((tl.sum(b_k1 * b_k1, 1) + tl.sum(b_k2 * b_k2, 1)) / d + eps)[
                    :, None
                ]
                b_k1, b_k2 = b_k1 * inverse * b_g1, b_k2 * inverse * b_g2
            if ROTATED:
                turning = inside[:, None] & (j[None, :] < DR // 2)
                at = n * table_n + o_t[:, None].to(tl.int64) * table_t + j[None, :]
                # (TOKENS, D2)
                b_cos, b_sin = (
                    tl.load(cos + at, turning, 1.0).to(tl.float32),
                    tl.load(sin + at, turning, 0.0).to(tl.float32),
                )
                b_k1, b_k2 = b_k1 * b_cos - b_k2 * b_sin, b_k2 * b_cos + b_k1 * b_sin
            if BASE == 3:
                b_s1, b_s2 = _halves(base, d, 1, o_t, inside, j, DR, d)
                b_k1, b_k2 = b_k1 + b_s1, b_k2 + b_s2
            if G == 1:
                first = (g == 0)[:, None]
                q1, q2 = (
                    tl.sum(tl.where(first, b_q1, 0.0).to(tl.float32), 0),
                    tl.sum(tl.where(first, b_q2, 0.0).to(tl.float32), 0),
                )
                # (GP, TOKENS)
                b_s = tl.where(
                    first, tl.sum(b_k1 * q1[None, :] + b_k2 * q2[None, :], 1)[None, :], 0.0
                )
            else:
                b_s = _dot(
                    b_q1,
                    tl.trans(b_k1.to(b_q1.dtype)),
                    tl.zeros((GP, TOKENS), tl.float32),
                    PRECISION,
                )
                b_s = _dot(b_q2, tl.trans(b_k2.to(b_q2.dtype)), b_s, PRECISION)
            b_s *= scale
            if MASKED:
                b_s += tl.load(mask + n * mask_n + o_t, inside, 0.0)[None, :]
            tl.store(
                scores + (n * heads + row[:, None]) * S + o_t[None, :],
                b_s,
                (g < G)[:, None] & inside[None, :],
            )
            top, total = _running(top, total, tl.where(inside[None, :], b_s, float("-inf")))
        chunks = tl.num_programs(0)
        tl.store(tops + (n * heads + row) * chunks + c, top, g < G)
        tl.store(totals + (n * heads + row) * chunks + c, total, g < G)

    @triton.jit
    def value_sums(
        base,
        own,
        scores,
        tops,
        sums,
        S,
        base_n,
        own_n,
        own_h,
        heads,
        H: tl.constexpr,
        G: tl.constexpr,
        HB: tl.constexpr,
        m: tl.constexpr,
        r: tl.constexpr,
        MB: tl.constexpr,
        RP: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        CHUNK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Eq 7 before C and B^T: base (N, S, m), own (N, H, S, r), scores (N, H G, S) -> sums (N, H
        G, chunks, m + r), each on the scale of its chunk's maximum. Programs: chunk, (block of
        heads, block of columns: those of the base, then the residual), row of the batch.
        """
        BLOCKS: tl.constexpr = (m + MB - 1) // MB + (1 if r > 0 else 0)
        c, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
        b, part = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
        rows = tl.arange(0, ROWS)
        row, there = b * HB * G + rows, (rows < HB * G) & (b * HB * G + rows < H * G)
        chunks = tl.num_programs(0)
        top = tl.load(tops + (n * heads + row) * chunks + c, there, 0.0)
        p_s = scores + (n * heads + row[:, None]) * S
        p_out = sums + ((n * heads + row[:, None]) * chunks + c) * (m + r)
        if part * MB < m:
            col = part * MB + tl.arange(0, MB)
            b_o = tl.zeros((ROWS, MB), tl.float32)
            for start in range(0, CHUNK, TOKENS):
                o_t = c * CHUNK + start + tl.arange(0, TOKENS)
                inside = o_t < S
                # (ROWS, TOKENS)
                b_p = tl.exp(
                    tl.load(p_s + o_t[None, :], there[:, None] & inside[None, :], float("-inf"))
                    - top[:, None]
                )
                b_b = tl.load(
                    base + n * base_n + o_t[:, None].to(tl.int64) * m + col[None, :],
                    inside[:, None] & (col[None, :] < m),
                    0.0,
                )
                b_o = _dot(b_p.to(b_b.dtype), b_b, b_o, PRECISION)
            tl.store(p_out + col[None, :], b_o, there[:, None] & (col[None, :] < m))
        else:
            o_r, head = tl.arange(0, RP), rows // G
            b_r = tl.zeros((ROWS, RP), tl.float32)
            for start in range(0, CHUNK, TOKENS):
                o_t = c * CHUNK + start + tl.arange(0, TOKENS)
                inside = o_t < S
                b_p = tl.exp(
                    tl.load(p_s + o_t[None, :], there[:, None] & inside[None, :], float("-inf"))
                    - top[:, None]
                )
                for i in range(HB):
                    h = b * HB + i
                    held = o_t < tl.where(h < H, S, 0)  # none of a head beyond the last
                    b_own = tl.load(
                        own
                        + n * own_n
                        + h.to(tl.int64) * own_h
                        + o_t[:, None].to(tl.int64) * r
                        + o_r[None, :],
                        # (TOKENS, RP)
                        held[:, None] & (o_r[None, :] < r),
                        0.0,
                    )
                    b_r = _dot(
                        tl.where(head[:, None] == i, b_p, 0.0).to(b_own.dtype),
                        b_own,
                        b_r,
                        PRECISION,
                    )
            tl.store(p_out + m + o_r[None, :], b_r, there[:, None] & (o_r[None, :] < r))

    @triton.jit
    def combine(
        sums,
        tops,
        totals,
        out,
        chunks,
        WIDTH: tl.constexpr,
        COLS: tl.constexpr,
        PAD: tl.constexpr,
        CHUNKS: tl.constexpr,
        LOWEST: tl.constexpr,
    ):
        """sums (rows, chunks, WIDTH), tops and totals (rows, chunks) -> out (rows, WIDTH): one
        softmax over all chunks.
        """
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * COLS + tl.arange(0, COLS)
        top, total, b_o = LOWEST, 0.0, tl.zeros((COLS,), tl.float32)
        for start in range(0, CHUNKS, PAD):
            o_c = start + tl.arange(0, PAD)
            b_top = tl.load(tops + row * chunks + o_c, o_c < chunks, LOWEST)
            higher = tl.maximum(top, tl.max(b_top, 0))
            share = tl.where(o_c < chunks, tl.exp(b_top - higher), 0.0)
            kept = tl.exp(top - higher)
            # (PAD, COLS)
            b_s = tl.load(
                sums + (row * chunks + o_c[:, None]) * WIDTH + col[None, :],
                (o_c < chunks)[:, None] & (col[None, :] < WIDTH),
                0.0,
            )
            b_o = b_o * kept + tl.sum(b_s * share[:, None], 0)
            total = total * kept + tl.sum(
                tl.load(totals + row * chunks + o_c, o_c < chunks, 0.0) * share, 0
            )
            top = higher
        tl.store(out + row * WIDTH + col, (b_o / total).to(out.dtype.element_ty), col < WIDTH)


def _power(n: int, least: int = 16) -> int:
    """The smallest power of two that holds n."""
    return max(least, 1 << max(0, n - 1).bit_length())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """As it is if every (tokens, width) block is contiguous, as caches keep it; otherwise a
    copy.
    """
    return (
        tensor
        if tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1] or tensor.shape[-1] == 0
        else tensor.contiguous()
    )


def _base_and_own(cached: tuple, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is cached, flat, as base (N, 1, S, m) and residual (N, H, S, r); of a form without
    residuals an empty one.
    """
    base, *more = cached
    own = more[0] if more else base.new_empty(base.shape[0], heads, base.shape[2], 0)
    return _flat(base), _flat(own)


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
    programs: int = PROGRAMS,
) -> torch.Tensor:
    """Attention of one new token per row to what is cached: (N, H, G, d).

    keys, values: the layer's `LowRankHeads`; query (N, H, G, d), rotated where keys are; cached_*:
    what they cache, at most one tensor for all heads and one of each head's; rotation: (cos, sin),
    (1 or N, S, at most d), of the cached keys; mask: None or numbers to add, (1 or N, 1, 1, S);
    norm: QK-norm with `weight` (d) and `variance_epsilon`; programs: aimed at per launch.
    """
    if (
        query.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and query.device.index != torch.cuda.current_device()
    ):
        # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device(query.device):
            return decode(
                keys,
                values,
                query,
                cached_keys,
                cached_values,
                rotation,
                mask,
                scale,
                norm,
                programs,
            )
    N, H, G, d = query.shape
    base, own = _base_and_own(cached_keys, H)
    v_base, v_own = _base_and_own(cached_values, H)
    S, given = base.shape[2], query.dtype
    query = query.to(base.dtype)  # they differ under autocast
    weight = lambda t: t.to(base.dtype)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=query.device)
    HB = max(1, ROWS // G)  # KV heads per program
    rows, blocks = _power(HB * G), triton.cdiv(H, HB)
    # few lengths, since each compiles a kernel
    chunk = TOKENS * _power(triton.cdiv(S, TOKENS * max(1, programs // (N * blocks))), 1)
    chunks = triton.cdiv(S, chunk)
    scores, tops, totals = new(N, H * G, S), new(N, H * G, chunks), new(N, H * G, chunks)
    direct = keys.read_as_is(rotation, norm)
    m, r = base.shape[-1], own.shape[-1]
    precision = "ieee" if query.dtype == torch.float32 else "widen" if INTERPRETED else "tf32"
    if mask is not None:
        mask = mask.to(torch.float32).expand(N, 1, 1, S)
    common = dict(
        MASKED=mask is not None, PRECISION=precision, LOWEST=LOWEST, TOKENS=TOKENS, CHUNK=chunk
    )
    mask_n = 0 if mask is None else mask.stride(0)
    filler = query  # a pointer for what is not there
    if direct:
        # of one slot, or of two
        q_base, q_own = (
            filler if q is None else q.contiguous() for q in [*keys.absorb(query), None][:2]
        )
        direct_scores[(chunks, blocks, N)](
            q_base,
            q_own,
            base,
            own,
            filler if mask is None else mask,
            scores,
            tops,
            totals,
            S,
            scale,
            base.stride(0),
            own.stride(0),
            own.stride(1),
            mask_n,
            H * G,
            H=H,
            G=G,
            HB=HB,
            m=m,
            r=r,
            MB=min(128, _power(m)),
            RP=_power(r),
            ROWS=rows,
            num_warps=4,
            **common,
        )
    else:
        cos, sin = rotation if rotation is not None else (filler, filler)
        turning = 0 if rotation is None else cos.shape[-1]
        kind = 0 if m == 0 else 3 if keys.caches_rotated else 2 if keys.C is None else 1
        rotated_scores[(chunks, H, N)](
            query.contiguous(),
            base,
            own,
            weight(keys.C) if kind == 1 else filler,
            weight(keys.B) if r else filler,
            filler if keys.bias is None else weight(keys.bias),
            filler if norm is None else weight(norm.weight),
            cos,
            sin,
            filler if mask is None else mask,
            scores,
            tops,
            totals,
            S,
            scale,
            0.0 if norm is None else norm.variance_epsilon,
            base.stride(0),
            own.stride(0),
            own.stride(1),
            cos.stride(0) if turning and len(cos) > 1 else 0,
            cos.stride(1) if turning else 0,
            mask_n,
            H * G,
            G=G,
            GP=_power(G),
            m=m,
            r=r,
            d=d,
            DR=turning,
            MB=min(128, _power(m)),
            RP=_power(r),
            D2=_power(d // 2),
            BASE=kind,
            BIASED=keys.bias is not None,
            NORMED=norm is not None,
            ROTATED=rotation is not None,
            num_warps=4,
            **common,
        )
    m, r = v_base.shape[-1], v_own.shape[-1]
    MB = min(128, _power(m))
    sums, out = (
        new(N, H * G, chunks, m + r),
        torch.empty(N, H, G, m + r, dtype=query.dtype, device=query.device),
    )
    value_sums[(chunks, blocks * (triton.cdiv(m, MB) + (r > 0)), N)](
        v_base,
        v_own,
        scores,
        tops,
        sums,
        S,
        v_base.stride(0),
        v_own.stride(0),
        v_own.stride(1),
        H * G,
        H=H,
        G=G,
        HB=HB,
        m=m,
        r=r,
        MB=MB,
        RP=_power(r),
        ROWS=rows,
        TOKENS=TOKENS,
        CHUNK=chunk,
        PRECISION=precision,
        num_warps=4,
    )
    combine[(N * H * G, triton.cdiv(m + r, 128))](
        sums,
        tops,
        totals,
        out,
        chunks,
        WIDTH=m + r,
        COLS=min(128, _power(m + r)),
        PAD=16,
        CHUNKS=_power(chunks),
        LOWEST=LOWEST,
        num_warps=4,
    )
    averages = [part if part.shape[-1] else None for part in out.split((m, r), dim=-1)]
    return values.expand_averages(averages).to(given)
