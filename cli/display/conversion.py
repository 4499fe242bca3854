"""Conversions, planned and done."""
import shlex
from pathlib import Path

from rich.console import Console

from lrkv_convert.device import in_units

from .parts import console_for, table_of


def _ranks(side: dict) -> str:
    return f"{side['base_width']} + H·{side['rank']}"


def show_plan(plan, model: str) -> None:
    """A dry run: per layer what is cached, and the sum."""
    g = plan.geometry
    out = console_for()
    out.print(f"{model}: {g.layers} layers, {g.kv_heads} KV heads of width {g.head_dim}, {g.groups} query head(s) each, "
              f"{'RoPE' if g.rotary else 'no rotary positions'}")
    table = table_of("layer", "keys", "values", "numbers/token", "before")
    for i, p in enumerate(plan.layers):
        after = p.key_width + g.kv_heads * p.key_rank + p.value_width + g.kv_heads * p.value_rank
        table.add_row(str(i), f"{p.key_width} + {g.kv_heads}·{p.key_rank}", f"{p.value_width} + {g.kv_heads}·{p.value_rank}", str(after),
                      str(2 * g.kv_heads * g.head_dim))
    out.print(table)
    _show_cost(out, plan.as_dict())
    out.print("Nothing was refused, nothing written.")


def _show_cost(out: Console, cache: dict) -> None:
    """What a cached token takes: bytes to hold, flops to read in a decoding step."""
    before, after = cache["kv_flops_per_token_before"], cache["kv_flops_per_token"]
    out.print(f"cache per token: {in_units(cache['kv_bytes_per_token_before'])} -> {in_units(cache['kv_bytes_per_token'])} ({cache['kv_ratio']:.1%}); "
              f"to read it: {before / 1e3:,.0f} -> {after / 1e3:,.0f} kflop ({after / cache['kv_bytes_per_token']:,.1f} per byte)")


def show_conversion(record: dict, model: str, folder: Path, layers: bool = True) -> None:
    """Per layer ranks and errors, the cache, time and memory, and the next command."""
    out, cache = console_for(), record["cache"]
    if layers:
        table = table_of("layer", "keys", "error", "values", "error")
        for row in record["layers"]:
            table.add_row(str(row["layer"]), _ranks(row["keys"]), f"{row['keys']['error']:.3f}", _ranks(row["values"]), f"{row['values']['error']:.3f}")
        out.print(table)
    _show_cost(out, cache)
    out.print(f"{record['seconds']:.0f} s, {in_units(record['peak_memory_bytes'])} of memory")
    if layers:
        print(f"next: lrkv compare {shlex.quote(model)} {shlex.quote(str(folder))} --text FILE")


def show_location(folder: Path) -> None:
    print(f"the converted model lies in {folder}")
