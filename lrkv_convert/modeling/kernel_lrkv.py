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

from typing import NamedTuple

import torch

from .codes_lrkv import SCALE_BYTES, Codes

try:
    import triton
    import triton.language as tl
except ImportError:  # torch alone decodes as well: the split path
    triton = None

ROWS = 16  # query heads per program: the smallest tile of the tensor cores
TOKENS = 64  # cached tokens per tile
CODES = 64  # latents per tile that are taken out of codes at once
WIDE = 256  # latents of keys, above which more tokens share a tile of their maps
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
    FIELDS = tl.constexpr(11)  # of a width of codes (`_widths`)

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
    def _scales(row, keep):
        """Rows of codes (n,) pointers -> scales, and 1 for those of sinks, (n,) float32."""
        # byte by byte: rows begin anywhere
        low, high = tl.load(row, keep, 0).to(tl.uint16), tl.load(row + 1, keep, 0).to(tl.uint16)
        scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.abs(scale), tl.where(scale < 0, 1.0, 0.0)

    @triton.jit
    def _plane(row, keep, i, there, CODES: tl.constexpr, P: tl.constexpr):
        """Bits (n, len(i)) int32 that a plane has of the i-th latents of a width. P: where the
        plane is said in CODES.
        """
        BITS: tl.constexpr = CODES[P]
        BYTES: tl.constexpr = CODES[P + 2]
        place = i + CODES[P + 3]
        part = place // BYTES  # of a byte
        at = CODES[P + 1] + place - part * BYTES
        held = (
            tl.load(row[:, None] + at[None, :], keep[:, None] & there[None, :], 0).to(tl.int32)
            ^ 128
        )
        return (held >> (part * BITS)[None, :]) & (2**BITS - 1)

    @triton.jit
    def _latents(row, keep, i, there, CODES: tl.constexpr, W: tl.constexpr):
        """Rows of codes (n,) pointers -> their i-th latents of a width in scales, (n, len(i))
        float32, exact in any 16 bits. W: where the width is said in CODES (`_widths`).
        """
        code = _plane(row, keep, i, there, CODES, W + 3)
        if CODES[W + 7] > 0:
            code = (code << CODES[W + 7]) | _plane(row, keep, i, there, CODES, W + 7)
        STEP: tl.constexpr = 2.0 ** (1 - CODES[W])
        return code.to(tl.float32) * STEP + (0.5 * STEP - 1)

    @triton.jit
    def _add_scores(
        scores,
        q,
        row_there,
        row,
        keep,
        CODES: tl.constexpr,
        W: tl.constexpr,
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Scores (ROWS, TOKENS) and those of the latents of a width, in scales. q: pointers to rows
        (ROWS,) of absorbed queries.
        """
        for start in range(0, CODES[W + 2], TILE):
            i = start + tl.arange(0, TILE)
            there = i < CODES[W + 2]
            b_q = tl.load(
                q[:, None] + (CODES[W + 1] + i)[None, :], row_there[:, None] & there[None, :], 0.0
            )
            b_z = _latents(row, keep, i, there, CODES, W)  # (TOKENS, TILE)
            scores = _dot(b_q, tl.trans(b_z.to(b_q.dtype)), scores, PRECISION)
        return scores

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
        BASE_CODES: tl.constexpr,
        OWN_CODES: tl.constexpr,
        BASE_BYTES: tl.constexpr,
        OWN_BYTES: tl.constexpr,
    ):
        """Eq 6: q_base (N, H G, m), q_own (N, H G, r), base (N, S, m), own (N, H, S, r) -> scores
        (N, H G, S), and per chunk their maximum and sum of exponentials (N, H G, chunks).

        *_CODES: `_widths` of base and residual where they are codes, rows of so many bytes; their
        queries have one more column, for sinks.
        """
        c, b, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        rows = tl.arange(0, ROWS)
        row, there = b * HB * G + rows, (rows < HB * G) & (b * HB * G + rows < H * G)
        o_m, o_r, head = tl.arange(0, MB), tl.arange(0, RP), rows // G
        top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
        if r > 0 and len(OWN_CODES) == 0:
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
            if len(BASE_CODES) > 0:
                p_z = base + n * base_n + o_t.to(tl.int64) * BASE_BYTES
                p_q = q_base + (n * heads + row) * (m + 1)
                for w in tl.static_range(0, len(BASE_CODES), FIELDS):
                    b_s = _add_scores(b_s, p_q, there, p_z, inside, BASE_CODES, w, MB, PRECISION)
                b_t, b_sink = _scales(p_z, inside)
                b_lift = tl.load(p_q + m, there, 0.0).to(tl.float32)
                b_s = b_s * b_t[None, :] + b_lift[:, None] * b_sink[None, :]
            elif m > 0:
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
            if len(OWN_CODES) > 0:
                p_q = q_own + (n * heads + row) * (r + 1)
                for i in range(HB):
                    h = b * HB + i
                    held = o_t < tl.where(h < H, S, 0)
                    p_z = own + n * own_n + h.to(tl.int64) * own_h + o_t.to(tl.int64) * OWN_BYTES
                    mine = there & (head == i)
                    b_o = tl.zeros((ROWS, TOKENS), tl.float32)
                    for w in tl.static_range(0, len(OWN_CODES), FIELDS):
                        b_o = _add_scores(b_o, p_q, mine, p_z, held, OWN_CODES, w, RP, PRECISION)
                    b_t, b_sink = _scales(p_z, held)
                    b_lift = tl.load(p_q + r, mine, 0.0).to(tl.float32)
                    b_s += b_o * b_t[None, :] + b_lift[:, None] * b_sink[None, :]
            elif r > 0:
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
    def _add_keys(
        k1,
        k2,
        row,
        keep,
        maps,
        map_row,
        map_column,
        j,
        CODES: tl.constexpr,
        W: tl.constexpr,
        TILE: tl.constexpr,
        DR: tl.constexpr,
        d: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Keys (TOKENS, D2), both halves, and what the latents of a width add to them, in scales.
        maps: of one head, a latent's row at map_row, its channels at map_column.
        """
        for start in range(0, CODES[W + 2], TILE):
            i = start + tl.arange(0, TILE)
            there = i < CODES[W + 2]
            # (TILE, D2)
            b_m1, b_m2 = _halves(maps, map_row, map_column, CODES[W + 1] + i, there, j, DR, d)
            b_z = _latents(row, keep, i, there, CODES, W).to(b_m1.dtype)  # (TOKENS, TILE)
            k1, k2 = _dot(b_z, b_m1, k1, PRECISION), _dot(b_z, b_m2, k2, PRECISION)
        return k1, k2

    @triton.jit
    def rotated_scores(
        query,
        base,
        own,
        C,
        B,
        bias,
        base_lift,
        own_lift,
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
        BASE_CODES: tl.constexpr,
        OWN_CODES: tl.constexpr,
        BASE_BYTES: tl.constexpr,
        OWN_BYTES: tl.constexpr,
    ):
        """Eq 4 and a dot product: query (N, H G, d), rotated; base (N, S, m), own (N, H, S, r), C
        (H, m, d), B (H, d, r), cos and sin (1 or N, S, DR) -> as `direct_scores`. One program per
        chunk and KV head. *_CODES: as there; *_lift (H, d): what sinks have in addition.

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
        if r > 0 and len(OWN_CODES) == 0:
            # (RP, D2)
            b_B1, b_B2 = _halves(B + h * d * r, 1, r, o_r, o_r < r, j, DR, d)
        if BASE == 1 and m <= MB and len(BASE_CODES) == 0:
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
            if len(BASE_CODES) > 0:
                p_z = base + o_t.to(tl.int64) * BASE_BYTES
                for w in tl.static_range(0, len(BASE_CODES), FIELDS):
                    b_k1, b_k2 = _add_keys(
                        b_k1,
                        b_k2,
                        p_z,
                        inside,
                        C + h * m * d,
                        d,
                        1,
                        j,
                        BASE_CODES,
                        w,
                        MB,
                        DR,
                        d,
                        PRECISION,
                    )
                b_l1, b_l2 = _halves(base_lift + h * d, d, 1, every, every == 0, j, DR, d)
                b_t, b_sink = _scales(p_z, inside)
                b_k1 = b_k1 * b_t[:, None] + b_l1 * b_sink[:, None]
                b_k2 = b_k2 * b_t[:, None] + b_l2 * b_sink[:, None]
            elif BASE == 1:
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
            if len(OWN_CODES) > 0:
                p_z = own + o_t.to(tl.int64) * OWN_BYTES
                b_t, b_sink = _scales(p_z, inside)
                # in scales of the residual while it is added: a second pair of tiles would not fit
                inverse = 1 / tl.where(inside, b_t, 1.0)[:, None]
                b_k1, b_k2 = b_k1 * inverse, b_k2 * inverse
                for w in tl.static_range(0, len(OWN_CODES), FIELDS):
                    b_k1, b_k2 = _add_keys(
                        b_k1,
                        b_k2,
                        p_z,
                        inside,
                        B + h * d * r,
                        1,
                        r,
                        j,
                        OWN_CODES,
                        w,
                        RP,
                        DR,
                        d,
                        PRECISION,
                    )
                b_l1, b_l2 = _halves(own_lift + h * d, d, 1, every, every == 0, j, DR, d)
                b_k1 = b_k1 * b_t[:, None] + b_l1 * b_sink[:, None]
                b_k2 = b_k2 * b_t[:, None] + b_l2 * b_sink[:, None]
            elif r > 0:
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
    def _coded_sums(
        z,
        z_h,
        p_s,
        there,
        head,
        top,
        p_out,
        c,
        b,
        S,
        start,
        first,
        CODES: tl.constexpr,
        W: tl.constexpr,
        TILE: tl.constexpr,
        m: tl.constexpr,
        SHARED: tl.constexpr,
        H: tl.constexpr,
        HB: tl.constexpr,
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        CHUNK: tl.constexpr,
        BYTES: tl.constexpr,
        TYPE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Softmax-weighted sums of latents `start` onwards of a width, and of the mark of sinks if
        these are the first latents, to p_out (ROWS,). z: rows of bytes of one row of the batch; p_s
        (ROWS,): scores; SHARED: whether they are of all heads.
        """
        i = start + tl.arange(0, TILE)
        kept = i < CODES[W + 2]
        b_o, b_marked = tl.zeros((ROWS, TILE), tl.float32), tl.zeros((ROWS,), tl.float32)
        for at in range(0, CHUNK, TOKENS):
            o_t = c * CHUNK + at + tl.arange(0, TOKENS)
            inside = o_t < S
            # (ROWS, TOKENS)
            b_p = tl.exp(
                tl.load(
                    p_s[:, None] + o_t[None, :], there[:, None] & inside[None, :], float("-inf")
                )
                - top[:, None]
            )
            for k in range(1 if SHARED else HB):
                row = z + o_t.to(tl.int64) * BYTES
                held = inside
                if not SHARED:
                    h = b * HB + k
                    row += h.to(tl.int64) * z_h
                    held = o_t < tl.where(h < H, S, 0)  # none of a head beyond the last
                b_t, b_sink = _scales(row, held)
                b_mine = b_p if SHARED else tl.where(head[:, None] == k, b_p, 0.0)
                b_marked += tl.sum(b_mine * b_sink[None, :], 1)
                b_z = _latents(row, held, i, kept, CODES, W).to(TYPE)
                b_o = _dot((b_mine * b_t[None, :]).to(TYPE), b_z, b_o, PRECISION)
        tl.store(p_out[:, None] + (CODES[W + 1] + i)[None, :], b_o, there[:, None] & kept[None, :])
        tl.store(p_out + m, b_marked, there & first)

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
        TYPE: tl.constexpr,
        BASE_CODES: tl.constexpr,
        OWN_CODES: tl.constexpr,
        BASE_BYTES: tl.constexpr,
        OWN_BYTES: tl.constexpr,
        BASE_BLOCKS: tl.constexpr,
        BLOCKS: tl.constexpr,
    ):
        """Eq 7 before C and B^T: base (N, S, m), own (N, H, S, r), scores (N, H G, S) -> sums (N, H
        G, chunks, m + r), each on the scale of its chunk's maximum; m and r with the mark of sinks
        where they are codes. Programs: chunk, (block of heads, block of columns: those of the base,
        then the residual), row of the batch. TYPE: to compute in, of those.
        """
        MARKED: tl.constexpr = m + (1 if len(BASE_CODES) > 0 else 0)
        ALL: tl.constexpr = MARKED + r + (1 if len(OWN_CODES) > 0 else 0)
        c, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
        b, part = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
        rows = tl.arange(0, ROWS)
        row, there = b * HB * G + rows, (rows < HB * G) & (b * HB * G + rows < H * G)
        chunks = tl.num_programs(0)
        top = tl.load(tops + (n * heads + row) * chunks + c, there, 0.0)
        p_s = scores + (n * heads + row[:, None]) * S
        p_out = sums + ((n * heads + row[:, None]) * chunks + c) * ALL
        if len(BASE_CODES) > 0:
            before = 0
            for w in tl.static_range(0, len(BASE_CODES), FIELDS):
                if (part >= before) & ((part - before) * MB < BASE_CODES[w + 2]):
                    _coded_sums(
                        base + n * base_n,
                        0,
                        scores + (n * heads + row) * S,
                        there,
                        rows // G,
                        top,
                        sums + ((n * heads + row) * chunks + c) * ALL,
                        c,
                        b,
                        S,
                        (part - before) * MB,
                        part == 0,
                        BASE_CODES,
                        w,
                        MB,
                        m,
                        True,
                        H,
                        HB,
                        ROWS,
                        TOKENS,
                        CHUNK,
                        BASE_BYTES,
                        TYPE,
                        PRECISION,
                    )
                before += (BASE_CODES[w + 2] + MB - 1) // MB
        elif part < BASE_BLOCKS:
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
        if len(OWN_CODES) > 0:
            before = BASE_BLOCKS
            for w in tl.static_range(0, len(OWN_CODES), FIELDS):
                if (part >= before) & ((part - before) * RP < OWN_CODES[w + 2]):
                    _coded_sums(
                        own + n * own_n,
                        own_h,
                        scores + (n * heads + row) * S,
                        there,
                        rows // G,
                        top,
                        sums + ((n * heads + row) * chunks + c) * ALL + MARKED,
                        c,
                        b,
                        S,
                        (part - before) * RP,
                        part == BASE_BLOCKS,
                        OWN_CODES,
                        w,
                        RP,
                        r,
                        False,
                        H,
                        HB,
                        ROWS,
                        TOKENS,
                        CHUNK,
                        OWN_BYTES,
                        TYPE,
                        PRECISION,
                    )
                before += (OWN_CODES[w + 2] + RP - 1) // RP
        elif part >= BASE_BLOCKS:
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
            tl.store(p_out + MARKED + o_r[None, :], b_r, there[:, None] & (o_r[None, :] < r))

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


class _Slot(NamedTuple):
    """What is cached of one slot, as the kernels take it."""

    held: torch.Tensor  # (N, 1 or H, S, width), flat
    width: int  # latents, the mark of sinks among them where codes were never made
    widths: tuple[int, ...]  # of codes (`_widths`), none where latents are numbers
    tile: int  # latents at once
    coder: Codes | None

    @property
    def coded(self) -> bool:
        return bool(self.widths)

    @property
    def columns(self) -> int:
        """Of absorbed queries and of averages: latents and the mark of sinks."""
        return self.width + self.coded

    @property
    def bytes(self) -> int:
        """Of a row of codes."""
        return self.held.shape[-1] if self.coded else 0

    @property
    def tiles(self) -> int:
        """In how many it is read."""
        counts = self.widths[2 :: 3 + 2 * 4] or [self.width]
        return sum(-(-count // self.tile) for count in counts)


def _widths(coder: Codes) -> tuple[int, ...]:
    """Where codes lie in their rows, as so many `FIELDS` for each width: bits, first latent,
    latents; then two planes, high bits first (0 bits where there is no second): bits, first byte,
    bytes, place of the first of these latents. A plane of n bytes has the bits of latents i,
    i + n, ... of its own in byte i.
    """
    planes, at = {}, SCALE_BYTES
    for bits, pieces in coder.planes.items():
        size, place = sum(count for _, count, _ in pieces) * bits // 8, 0
        for first, count, _ in pieces:
            planes[first] = (*planes.get(first, ()), bits, at, size, place)
            place += count
        at += size
    found, first = (), 0
    for bits, count in coder.blocks:
        found += bits, first, count, *(planes[first] + (0,) * 4)[:8]
        first += count
    return found


def _slots(side, cached: tuple, heads: int) -> tuple[_Slot, _Slot]:
    """Base (N, 1, S, width) and residual (N, H, S, width) of keys or values; of a form without
    residuals an empty one.
    """
    base, *more = cached
    own = more[0] if more else base.new_empty(base.shape[0], heads, base.shape[2], 0)
    found = []
    for held, coder, most in zip((base, own), side.coders, (128, None), strict=True):
        if coder is not None and held.dtype == torch.uint8:
            widths, width = _widths(coder), coder.width
            tile = min(CODES, _power(max(count for _, count in coder.blocks)))
        else:
            widths, width = (), held.shape[-1]
            tile = _power(width) if most is None else min(most, _power(width))
        found.append(_Slot(_flat(held), width, widths, tile, coder))
    return found[0], found[1]


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
    base, own = _slots(keys, cached_keys, H)
    v_base, v_own = _slots(values, cached_values, H)
    S, given = base.held.shape[2], query.dtype
    # numbers that are cached differ from the query under autocast; codes go with any
    dtype = next(
        (slot.held.dtype for slot in (base, own, v_base, v_own) if slot.width and not slot.coded),
        given,
    )
    query = query.to(dtype)
    weight = lambda t: t.to(dtype).contiguous()
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=query.device)
    HB = max(1, ROWS // G)  # KV heads per program
    rows, blocks = _power(HB * G), triton.cdiv(H, HB)
    direct = keys.read_as_is(rotation, norm)
    # maps of wide latents are read again for every tile of tokens: half as often
    tokens = TOKENS if direct or not base.coded or base.width <= WIDE else 2 * TOKENS
    # few lengths, since each compiles a kernel
    chunk = tokens * _power(triton.cdiv(S, tokens * max(1, programs // (N * blocks))), 1)
    chunks = triton.cdiv(S, chunk)
    scores, tops, totals = new(N, H * G, S), new(N, H * G, chunks), new(N, H * G, chunks)
    precision = "ieee" if query.dtype == torch.float32 else "widen" if INTERPRETED else "tf32"
    if mask is not None:
        mask = mask.to(torch.float32).expand(N, 1, 1, S)
    common = dict(
        MASKED=mask is not None,
        PRECISION=precision,
        LOWEST=LOWEST,
        CHUNK=chunk,
        m=base.width,
        r=own.width,
        MB=base.tile,
        RP=own.tile,
        BASE_CODES=base.widths,
        OWN_CODES=own.widths,
        BASE_BYTES=base.bytes,
        OWN_BYTES=own.bytes,
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
            base.held,
            own.held,
            filler if mask is None else mask,
            scores,
            tops,
            totals,
            S,
            scale,
            base.held.stride(0),
            own.held.stride(0),
            own.held.stride(1),
            mask_n,
            H * G,
            H=H,
            G=G,
            HB=HB,
            ROWS=rows,
            TOKENS=TOKENS,
            num_warps=4,
            **common,
        )
    else:
        cos, sin = rotation if rotation is not None else (filler, filler)
        turning = 0 if rotation is None else cos.shape[-1]
        kind = 0 if base.width == 0 else 3 if keys.caches_rotated else 2 if keys.C is None else 1
        # what was never made into codes has the mark of sinks as one more latent
        C = keys.C if base.coded or kind != 1 else keys.base_maps()
        B = keys.B if own.coded or own.coder is None else keys.residual_maps().mT
        lift = lambda slot: weight(slot.coder.lift) if slot.coded else filler
        rotated_scores[(chunks, H, N)](
            query.contiguous(),
            base.held,
            own.held,
            weight(C) if kind == 1 else filler,
            weight(B) if own.width else filler,
            filler if keys.bias is None else weight(keys.bias),
            lift(base),
            lift(own),
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
            base.held.stride(0),
            own.held.stride(0),
            own.held.stride(1),
            cos.stride(0) if turning and len(cos) > 1 else 0,
            cos.stride(1) if turning else 0,
            mask_n,
            H * G,
            G=G,
            GP=_power(G),
            d=d,
            DR=turning,
            D2=_power(d // 2),
            BASE=kind,
            BIASED=keys.bias is not None,
            NORMED=norm is not None,
            ROTATED=rotation is not None,
            TOKENS=tokens,
            num_warps=4 * tokens // TOKENS,
            **common,
        )
    columns = [slot.columns for slot in (v_base, v_own)]
    sums, out = (
        new(N, H * G, chunks, sum(columns)),
        torch.empty(N, H, G, sum(columns), dtype=query.dtype, device=query.device),
    )
    value_sums[(chunks, blocks * (v_base.tiles + v_own.tiles), N)](
        v_base.held,
        v_own.held,
        scores,
        tops,
        sums,
        S,
        v_base.held.stride(0),
        v_own.held.stride(0),
        v_own.held.stride(1),
        H * G,
        H=H,
        G=G,
        HB=HB,
        m=v_base.width,
        r=v_own.width,
        MB=v_base.tile,
        RP=v_own.tile,
        ROWS=rows,
        TOKENS=TOKENS,
        CHUNK=chunk,
        PRECISION=precision,
        TYPE=getattr(tl, str(dtype).removeprefix("torch.")),
        BASE_CODES=v_base.widths,
        OWN_CODES=v_own.widths,
        BASE_BYTES=v_base.bytes,
        OWN_BYTES=v_own.bytes,
        BASE_BLOCKS=v_base.tiles,
        BLOCKS=v_base.tiles + v_own.tiles,
        num_warps=4,
    )
    combine[(N * H * G, triton.cdiv(sum(columns), 128))](
        sums,
        tops,
        totals,
        out,
        chunks,
        WIDTH=sum(columns),
        COLS=min(128, _power(sum(columns))),
        PAD=16,
        CHUNKS=_power(chunks),
        LOWEST=LOWEST,
        num_warps=4,
    )
    averages = [part if part.shape[-1] else None for part in out.split(columns, dim=-1)]
    return values.expand_averages(averages).to(given)
