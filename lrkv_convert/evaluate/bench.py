"""End-to-end decoding of whole models, side by side in one process: time per token, tokens per
second, memory, and how far that is from the time it takes to move the bytes.

The models are the ones saved, through the path their own code takes. Caches are filled with random
numbers, which time does not mind: a prefill of 32,000 tokens would only wait. Rounds alternate
between contenders, so that a slow moment of the machine meets all of them; medians count.

Of an encoder-decoder the decoder's step is timed: the cache of self-attention holds the tokens
asked for, that of cross-attention all positions that a speech model's encoder has, or as many as
there are tokens of a text. The encoder runs once per input and is not timed.
"""

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from ..device import give_back_memory, in_units, memory_of
from ..errors import LrkvError, first_line
from ..families import Site, family_named
from ..folder.companions import FIELDS
from ..modeling import attention_class, kernel_lrkv
from ..modeling.attention_lrkv import LrkvAttention, choose_path
from ..modeling.contract_lrkv import CACHE
from .caches import new_cache, static_cache
from .load import load_model
from .memory import by_attention, bytes_by_kind, formula_bytes_by_kind
from .positions import encoder_positions, positions
from .step import bandwidth, random, seconds

CACHES = ("static", "dynamic")
WARM_UP = 3  # steps before any that counts; also what initialises the cache


@dataclass
class Contender:
    """One model through one path; `path` is None for an original, whose path is its attention
    function.
    """

    name: str
    model: PreTrainedModel
    path: str | None
    cache: Cache | None = field(default=None, repr=False)
    inputs: dict = field(default_factory=dict, repr=False)  # of a step

    @property
    def taken(self) -> str:
        """The path that attends: what "auto" comes to."""
        if self.path != "auto":
            return self.path or "original"
        config: Any = self.model.config
        model = self.model
        read = all(
            m.keys.in_kernel and m.values.in_kernel
            for m in model.modules()
            if isinstance(m, LrkvAttention)
        )
        found = {
            choose_path(
                "auto",
                queries=site.geometry.groups,
                tokens=1,
                implementation=config._attn_implementation,
                mask=None,
                training=False,
                cached=True,
                device=model.device,
                dtype=model.dtype,
                kernel=site.kind in attention_class(site.adapter.model_type).kernel and read,
            )
            for site in sites_of(config, converted_kinds(config))
        }
        return f"auto: {', '.join(sorted(found))}"

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token for every row of the cache."""
        if self.path is not None:
            self.model.config.lrkv_path = self.path
        self.model(**self.inputs, **{CACHE: self.cache}, use_cache=True)


def converted_kinds(config) -> list[str]:
    """The kinds of attention that are converted; [] of an original."""
    return [kind for kind, name in FIELDS.items() if getattr(config, name, None) is not None]


def sites_of(config, kinds: Collection[str]) -> list[Site]:
    """Attention of these kinds; [] in a family that this package does not know."""
    family = family_named(config.model_type)
    return [] if family is None else family.sites(config, kinds)


def step_inputs(model: PreTrainedModel, batch: int, tokens: int) -> dict:
    """Arguments of a step: a token (N, 1) for each of `batch` rows and, of an encoder-decoder, what
    its encoder would have given, (N, S, D), beside a cache of `tokens`.
    """
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    shape = batch, encoder_positions(model.config, tokens), model.config.hidden_size
    states = BaseModelOutput(last_hidden_state=random(shape, model.device, model.dtype))
    return {"decoder_input_ids": ids, "encoder_outputs": states}


@torch.no_grad()
def filled_cache(model: PreTrainedModel, kind: str, batch: int, tokens: int, room: int) -> Cache:
    """A cache of `kind` that holds `tokens` random tokens for each of `batch` rows, and has room
    for more; of an encoder-decoder also the positions of its encoder, random states. Any model
    whose cache layers are transformers' static or dynamic ones, sliding or not.
    """
    cache = (
        static_cache(model, tokens + room, encoder_positions(model.config, tokens))
        if kind == "static"
        else new_cache(model)
    )
    # writes one token, and all that cross-attention ever reads
    model(**step_inputs(model, batch, tokens), **{CACHE: cache}, use_cache=True)
    layers: list[Any] = by_attention(cache)["self"].layers
    for layer in layers:
        if layer.keys is None:  # nothing is kept there
            continue
        held = (
            min(tokens, layer.sliding_window - 1)
            if layer.is_sliding and kind == "dynamic"
            else tokens
        )
        for name in ("keys", "values"):
            old = getattr(layer, name)
            if old.dtype == torch.uint8:  # codes: the token that is there, again and again
                row = old[:, :, :1].clone()
                rows = row.expand(-1, -1, old.shape[2] if kind == "static" else held, -1)
                setattr(layer, name, rows.clone()) if kind == "dynamic" else old.copy_(rows)
            elif kind == "static":
                old.copy_(random(old.shape, old.device, old.dtype))
            else:
                setattr(
                    layer,
                    name,
                    random((*old.shape[:2], held, old.shape[-1]), old.device, old.dtype),
                )
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(min(tokens, layer.max_cache_len))
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = tokens
    return cache


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but an input embedding of its own, of which it
    reads a row, and but what of an encoder-decoder runs once per input: the encoder, and what
    writes the cache of cross-attention.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    unread = {embedding.weight.data_ptr()} - {head.weight.data_ptr()}
    parts: list[nn.Module] = [model]
    if model.config.is_encoder_decoder:
        parts = [model.get_decoder(), head]
        unread |= {p.data_ptr() for p in cross_writers(model)}
    read = {p.data_ptr(): p.numel() * p.element_size() for part in parts for p in part.parameters()}
    return sum(size for at, size in read.items() if at not in unread)


def cross_writers(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that make what cross-attention caches."""
    found = []
    for site in sites_of(model.config, ["cross"]):
        attention: Any = model.get_submodule(site.path)
        if "cross" in converted_kinds(model.config):
            sides = (attention.keys, attention.values)
            writers = [part for side in sides for part in (side.W_shared, side.U) if part]
        else:
            writers = [attention.get_submodule(name) for name in site.adapter.projections[1:]]
        found += [p for writer in writers for p in writer.parameters()]
    return found


def working_bytes(call: Callable, device: torch.device) -> int | None:
    """Memory that `call` takes beyond what is held before it: peak minus level. None where the
    system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # what the allocator kept of earlier steps would hide as much of this one
        give_back_memory()
        # Linux: resets the peak to the level
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field)
            ).split()[1]
        )
        * 1024
    )


def contenders(
    paths: list[str], routes: Sequence[str], device: torch.device, dtype: torch.dtype | str
) -> list[Contender]:
    """Models loaded, each converted one once per route. Raises LrkvError."""
    found = []
    for path in paths:
        model = load_model(path, device, dtype)
        name = Path(path).name
        if not converted_kinds(model.config):
            found.append(Contender(name, model, None))
            continue
        for route in routes:
            if route == "kernel" and (lacks := kernel_lrkv.missing(model.device, model.dtype)):
                raise LrkvError(
                    f"the kernel path cannot run: {lacks}", "leave it out of --paths, or use auto"
                )
            found.append(Contender(name, model, route))
    return found


def bench(
    paths: list[str],
    *,
    tokens: list[int],
    batches: Sequence[int] = (1,),
    routes: Sequence[str] = ("auto",),
    cache: str = "static",
    steps: int = 9,
    longest: bool = False,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict:
    """Decode with every model at every context length and batch size. Returns {"rows": [...], ...};
    the first model is what others are compared with. Raises LrkvError for models or sizes that
    cannot run.

    tokens: cached tokens per row; routes: attention paths of converted models
    (modeling/attention_lrkv.py); cache: one of CACHES; steps: timed; longest: also look for the
    longest context each contender can decode in the memory of the device (CUDA only).
    """
    if longest and device.type != "cuda":
        raise LrkvError(
            "the longest context that fits is found on a GPU only",
            "a computer without one would swap long before it failed",
        )
    found, room = (
        contenders(paths, routes, device, dtype),
        (WARM_UP + steps + 2) * max(1, len(routes)),
    )
    for length in tokens:
        for c in found:
            limit = positions(c.model.config)
            if limit is not None and length + room > limit:
                raise LrkvError(
                    f"{c.name} reads {limit} tokens, and {length} leave no room for the {room} that"
                    " are decoded",
                    (
                        f"give --tokens of at most {limit - room}"
                        if limit > room
                        else "give fewer --steps"
                    ),
                )
    for c in found:  # a CPU's memory overflows without an error: the system ends the process
        config, most, there = c.model.config, max(tokens), memory_of(device)
        counts = {"self": most + room, "cross": encoder_positions(config, most)}
        per_place = formula_bytes_by_kind(config, c.model.dtype.itemsize) or {}
        needed = max(batches) * sum(size * counts[kind] for kind, size in per_place.items())
        if there is not None and needed > there:
            raise LrkvError(
                f"no memory for {max(batches)} x {max(tokens)} tokens of {c.name}:"
                f" {in_units(needed)} of {in_units(there)}",
                "give smaller --tokens or --batch",
            )
    rate, rows = bandwidth(device), []
    for i, batch in enumerate(batches):
        for j, length in enumerate(tokens):
            filled: dict[int, Cache] = {}
            for c in found:  # the paths of one model share its cache
                if id(c.model) not in filled:
                    try:
                        filled[id(c.model)] = filled_cache(c.model, cache, batch, length, room)
                    # torch.OutOfMemoryError is one, and what a CPU raises has no class of its own
                    except RuntimeError as error:
                        if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
                            raise LrkvError(
                                f"no memory for {batch} x {length} tokens of {c.name}",
                                "give smaller --tokens or --batch",
                            ) from error
                        # transformers' own Falcon with ALiBi fails there
                        if cache == "static":
                            raise LrkvError(
                                f"{c.name} does not run with a static cache: {first_line(error)}",
                                "give --cache dynamic",
                            ) from error
                        raise
                c.cache = filled[id(c.model)]
                c.inputs = step_inputs(c.model, batch, length)
            held = {id(c): bytes_by_kind(filled[id(c.model)]) for c in found}
            taken = seconds({str(k): c.step for k, c in enumerate(found)}, device, steps)
            medians = [statistics.median(times) for times in taken.values()]
            for c, median in zip(found, medians):
                caches, working = held[id(c)], working_bytes(c.step, device)
                total = sum(caches.values())
                moved = read_bytes(c.model) + total
                weights = sum(p.numel() * p.element_size() for p in c.model.parameters())
                rows.append(
                    {
                        "model": c.name,
                        "path": c.taken,
                        "batch": batch,
                        "tokens": length,
                        "milliseconds": median * 1e3,
                        "tokens_per_second": batch / median,
                        "speedup": medians[0] / median,
                        "positions": (
                            encoder_positions(c.model.config, length) if "cross" in caches else None
                        ),
                        "cache_bytes": total,
                        "caches": caches,
                        "peak_bytes": None if working is None else weights + total + working,
                        "bytes_read": moved,
                        "limit_milliseconds": moved / rate * 1e3,
                        "of_limit": moved / rate / median,
                    }
                )
            for c in found:
                c.cache, c.inputs = None, {}
            progress(i * len(tokens) + j + 1, len(batches) * len(tokens))
    fitting = (
        [
            {
                "model": c.name,
                "path": c.taken,
                "batch": batch,
                "tokens": longest_context(c, cache, batch),
            }
            for batch in batches
            for c in found
        ]
        if longest
        else []
    )
    return {
        "models": [str(p) for p in paths],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "longest": fitting,
        "cache": cache,
        "steps": steps,
        "dtype": str(found[0].model.dtype).removeprefix("torch."),
        "copy_bytes_per_second": rate,
        "rows": rows,
    }


def longest_context(
    contender: Contender, kind: str, batch: int, start: int = 1024, precision: int = 256
) -> int:
    """The longest context whose cache fits the device and decodes a token, to `precision` tokens; 0
    if not even so many fit, and never more positions than the model has.
    """
    limit = positions(contender.model.config) or 1 << 30

    def fits(length: int) -> bool:
        try:
            contender.cache = filled_cache(contender.model, kind, batch, length, WARM_UP)
            contender.inputs = step_inputs(contender.model, batch, length)
            contender.step()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            contender.cache, contender.inputs = None, {}
            if contender.model.device.type == "cuda":
                torch.cuda.empty_cache()

    low, high, limit = 0, start, limit - WARM_UP
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > precision:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
