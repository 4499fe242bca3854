"""One attention step of decoding, alone: the paths of a converted layer beside attention on the
full cache, same shapes, same process.

Weights and caches are random, which timing does not mind; what runs is the code that converted
models run (modeling/attention_lrkv.py). Every contender has its cache allocated beforehand; the
table of rotations, made once per step for all layers of a model, is not timed. The full cache is
read by torch's SDPA and by two products with a softmax between ("eager", and with tokens first),
which are faster on some CPUs. Rounds alternate between contenders, so that a slow moment of the
machine meets all of them; the median counts. The limit is what the bytes of the cache cost at the
rate of a plain copy on the same machine, bytes read plus bytes written.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling import kernel_lrkv
from ..modeling.attention_lrkv import LrkvAttention
from ..modeling.codes_lrkv import Blocks, Codes
from ..modeling.factors_lrkv import LowRankHeads
from ..modeling.forms_lrkv import FORMS


@dataclass(frozen=True)
class Shape:
    """One layer: H KV heads, G query heads each, head width d; keys and values (m, r); form of
    keys; whether keys are under RoPE; codes of keys and of values, as `LowRankHeads` takes them;
    head_groups: of KV heads that share a base.
    """

    heads: int
    groups: int
    head_dim: int
    keys: tuple[int, int]
    values: tuple[int, int]
    form: str = "joint"
    rotary: bool = False
    alignment: bool = True
    codes: tuple[Sequence[Blocks | None] | None, Sequence[Blocks | None] | None] = (None, None)
    head_groups: int = 1

    def modules(self) -> tuple[LowRankHeads, LowRankHeads]:
        """Keys and values, their factors not filled."""
        size = 64, self.heads, self.head_dim  # the width D plays no part
        form = FORMS[self.form]
        alignment = self.alignment and form.has_maps
        shared = {"groups": self.head_groups} if self.head_groups > 1 else {}
        sides: list[dict[str, Any]] = [{"codes": c, **shared} if c else {} for c in self.codes]
        of_keys, of_values = sides
        return (
            form(*size, *self.keys, alignment, False, **of_keys),
            LowRankHeads(*size, *self.values, True, False, **of_values),
        )

    def bytes(self, element_size: int) -> int:
        """Cached per token. element_size: of a number that is not a code."""
        with torch.device("meta"):
            sides = self.modules()
        return sum(
            heads * width * (1 if coder is not None else element_size)
            for side in sides
            for (heads, width), coder in zip(side.slots(), side.coders)
        )

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel knows it."""
        with torch.device("meta"):
            return all(side.in_kernel for side in self.modules())

    @property
    def full(self) -> int:
        """Numbers per token of the full cache."""
        return 2 * self.heads * self.head_dim


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read plus written, of a plain copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # the best, as it is to be a limit
    return 2 * size / min(seconds({"copy": lambda: target.copy_(source)}, device, 15)["copy"])


def seconds(
    contenders: dict[str, Callable], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time of each contender in each round, in turn, after one call to warm up (three on a GPU).
    GPU times are those of the device.
    """
    taken = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3 if device.type == "cuda" else 1):
            call()
    for _ in range(rounds):
        for name, call in contenders.items():
            if device.type == "cuda":
                start, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                start.record()
                call()
                end.record()
                end.synchronize()
                taken[name].append(start.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - start)
    return taken


class Layer(LrkvAttention):
    """What the paths need of an attention module, and a filled cache."""

    def __init__(
        self, shape: Shape, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
    ):
        H, d = shape.heads, shape.head_dim
        new = lambda *size: random(size, device, dtype)
        self.scaling = d**-0.5
        self.keys, self.values = shape.modules()
        for side in (self.keys, self.values):
            for parameter in side.parameters():
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            side.to(device, dtype).requires_grad_(False)
        self.cached = [
            tuple(
                new(batch, heads, tokens, width)
                if coder is None
                else rows(coder, batch, heads, tokens, device)
                for (heads, width), coder in zip(side.latents(), side.coders)
            )
            for side in (self.keys, self.values)
        ]
        self.query = new(batch, H * shape.groups, 1, d)
        self.rotation = None
        if shape.rotary:
            angles = torch.arange(tokens, device=device)[:, None] * 1e4 ** (
                -torch.arange(d // 2, device=device) / (d // 2)
            )
            angles = torch.cat((angles, angles), dim=-1)[None]
            self.rotation = angles.cos().to(dtype), angles.sin().to(dtype)

    def run(self, path: str) -> Tensor:
        """(N, 1, H G, d)."""
        if path == "rebuild":
            key, value = (
                self.keys.rebuild(self.cached[0], self.rotation),
                self.values.rebuild(self.cached[1]),
            )
            return full_attention(self.query, key, value).transpose(1, 2)
        keys, values = self.cached
        return self.read_in_place(path, self.query, keys, values, None, self.rotation)[0]


def random(
    size: tuple, device: torch.device, dtype: torch.dtype, distinct: int = 1 << 22
) -> Tensor:
    """Normal numbers, repeated after `distinct`: what is timed does not mind, and a cache of
    gigabytes is there at once.
    """
    count = math.prod(size)
    numbers = torch.randn(min(count, distinct), device=device).to(dtype)
    return numbers.repeat(-(-count // max(1, len(numbers))))[:count].view(size)


def rows(
    coder: Codes, batch: int, heads: int, tokens: int, device: torch.device, distinct: int = 512
) -> Tensor:
    """Codes of normal latents about usual tokens, (batch, heads, tokens, bytes), repeated after
    `distinct` tokens; the first is a sink, far from them.
    """
    coder.centres[1] += 100
    latents = torch.randn(1, heads, 1 + min(tokens, distinct), coder.width, device=device)
    latents += coder.centres[0].float().unsqueeze(1)
    latents[:, :, 0] = coder.centres[1]
    first, others = coder.pack(latents).split((1, latents.shape[2] - 1), dim=2)
    packed = torch.cat((first, others.repeat(1, 1, -(-tokens // others.shape[2]), 1)), dim=2)
    return packed[:, :, :tokens].repeat(batch, 1, 1, 1)


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's SDPA for one new token: (N, H G, 1, d). Queries of a group go in as rows of one head,
    faster on CPUs than `enable_gqa`.
    """
    return torch.nn.functional.scaled_dot_product_attention(_packed(query, key), key, value).view(
        query.shape
    )


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by plain products."""
    scores = _packed(query, key) * query.shape[-1] ** -0.5 @ key.mT
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).view(query.shape)


def product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with tokens first in the scores, which a CPU reads faster."""
    scores = (key @ (_packed(query, key) * query.shape[-1] ** -0.5).mT).mT
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).view(query.shape)


def _packed(query: Tensor, key: Tensor) -> Tensor:
    """(N, H G, 1, d) -> (N, H, G, d)."""
    return query.view(len(query), key.shape[1], -1, query.shape[-1])


@torch.no_grad()
def attention_step(
    shape: Shape,
    batch: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 9,
    rebuild: bool = True,
    copy_rate: float | None = None,
) -> list[dict]:
    """Rows for the full cache and each path: milliseconds, ratio to the full cache (above 1 is
    faster), bytes read, the limit and how near it is.

    copy_rate: of `bandwidth`, measured once per run. rebuild: whether the rebuild path is timed (it
    allocates the full K and V).
    """
    H, d = shape.heads, shape.head_dim
    layer = Layer(shape, batch, tokens, device, dtype)
    key, value = (random((batch, H, tokens, d), device, dtype) for _ in range(2))
    paths = [
        "split",
        *(["kernel"] if not kernel_lrkv.missing(device, dtype) and device.type != "cpu" else []),
        *(["rebuild"] if rebuild else []),
    ]
    contenders = {
        "full cache": lambda: full_attention(layer.query, key, value),
        "full, eager": lambda: eager_attention(layer.query, key, value),
        "full, tokens first": lambda: product_attention(layer.query, key, value),
        **{path: lambda path=path: layer.run(path) for path in paths},
    }
    taken = {
        name: statistics.median(times)
        for name, times in seconds(contenders, device, rounds).items()
    }
    rows = []
    for name, median in taken.items():
        whole = shape.full * dtype.itemsize
        token = whole if name.startswith("full") else shape.bytes(dtype.itemsize)
        moved = batch * tokens * token
        rows.append(
            {
                "path": name,
                "batch": batch,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": median * 1e3,
                "speedup": taken["full cache"] / median,
                "bytes": moved,
                "cache_ratio": token / whole,
            }
        )
        if copy_rate:
            rows[-1] |= {
                "limit_milliseconds": moved / copy_rate * 1e3,
                "of_limit": moved / copy_rate / median,
            }
    return rows
