"""Conversions, planned and done."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from lrkv_convert.device import in_units
from lrkv_convert.families import ENCODER_DECODERS
from lrkv_convert.folder.markup import quoted

from .parts import console_for, say, table_of


def _ranks(side: dict) -> str:
    return f"{side['base_width']} + H·{side['rank']}"


KINDS = {
    "self": ("decoder self-attention", "token"),
    "cross": ("cross-attention", "encoder position"),
}


def show_plan(plan, model: str, plans: Mapping = MappingProxyType({})) -> None:
    """A dry run: per layer what is cached, and the sum. plans: of an encoder-decoder, by kind of
    attention.
    """
    out = console_for()
    for kind, each in plans.items() or [(None, plan)]:
        _show_plan(out, each, model, kind)
    out.print("Nothing was refused, nothing written.")


def _show_plan(out: Console, plan, model: str, kind: str | None) -> None:
    g, (name, unit) = plan.geometry, KINDS.get(kind, ("", "token"))
    out.print(
        f"{model}: {f'{name}, ' if name else ''}{g.layers} layers, {g.kv_heads} KV heads of width"
        f" {g.head_dim}, {g.groups} query head(s) each,"
        f" {'RoPE' if g.rotary else 'no rotary positions'}"
    )
    table = table_of("layer", "keys", "values", f"numbers/{unit}", "before")
    for i, p in enumerate(plan.layers):
        after = p.key_width + g.kv_heads * p.key_rank + p.value_width + g.kv_heads * p.value_rank
        table.add_row(
            str(i),
            f"{p.key_width} + {g.kv_heads}·{p.key_rank}",
            f"{p.value_width} + {g.kv_heads}·{p.value_rank}",
            str(after),
            str(2 * g.kv_heads * g.head_dim),
        )
    out.print(table)
    _show_cost(out, plan.as_dict(), unit)


def _show_cost(out: Console, cache: dict, unit: str = "token") -> None:
    """What a cached token takes: bytes to hold, flops to read in a decoding step."""
    before, after = cache["kv_flops_per_token_before"], cache["kv_flops_per_token"]
    out.print(
        f"cache per {unit}: {in_units(cache['kv_bytes_per_token_before'])} ->"
        f" {in_units(cache['kv_bytes_per_token'])} ({cache['kv_ratio']:.1%}); to read it:"
        f" {before / 1e3:,.0f} -> {after / 1e3:,.0f} kflop"
        f" ({after / cache['kv_bytes_per_token']:,.1f} per byte)"
    )


def show_conversion(record: dict, model: str, folder: Path, layers: bool = True) -> None:
    """Per layer ranks and errors, the cache, time and memory, and the next command."""
    out = console_for()
    for kind, fitted in (record.get("attention") or {None: record}).items():
        name, unit = KINDS.get(kind, ("layer", "token"))
        if layers:
            table = table_of(name, "keys", "error", "values", "error")
            for row in fitted["layers"]:
                table.add_row(
                    str(row["layer"]),
                    _ranks(row["keys"]),
                    f"{row['keys']['error']:.3f}",
                    _ranks(row["values"]),
                    f"{row['values']['error']:.3f}",
                )
            out.print(table)
        _show_cost(out, fitted["cache"], unit)
    width, examples = fitted["geometry"]["width"], record["calibration"].get("examples")
    if examples and record["calibration"]["tokens"] < width:
        out.print(
            f"calibrated on {record['calibration']['tokens']:,} target tokens, fewer than the model"
            f" is wide ({width:,}): the errors say little, give more"
        )
    out.print(f"{record['seconds']:.0f} s, {in_units(record['peak_memory_bytes'])} of memory")
    if layers:
        measured_on = (
            "--text FILE"
            if "attention" not in record
            else (
                "--audio FOLDER"
                if ENCODER_DECODERS[record["source"]["model_type"]].speech
                else "--pairs FILE"
            )
        )
        say(f"next: lrkv compare {quoted([model, str(folder)])} {measured_on}")


def show_location(folder: Path) -> None:
    say(f"the converted model lies in {folder}")
