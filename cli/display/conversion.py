"""Conversions, planned and done."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from lrkv_convert.device import in_units
from lrkv_convert.families import family_named
from lrkv_convert.folder.markup import quoted
from lrkv_convert.format import Cost, Fit, Record

from .parts import console_for, measured_on, of_memory, say, table_of

KINDS = {
    "self": ("decoder self-attention", "token"),
    "cross": ("cross-attention", "encoder position"),
}


def show_plan(plans: Mapping, forms: Mapping, model: str) -> None:
    """A dry run: per layer what is cached, and the sum, by kind of attention. forms: by kind and
    name of each form of keys, the plan of the same budget.
    """
    out = console_for()
    for kind, plan in plans.items():
        _show_plan(out, plan, model, kind if len(plans) > 1 or kind != "self" else None)
        if forms.get(kind):
            _show_forms(out, forms[kind], plan.keys, KINDS[kind][1])
    out.print("Nothing was refused, nothing written.")


def _show_plan(out: Console, plan, model: str, kind: str | None) -> None:
    g, (name, unit) = plan.geometry, KINDS.get(kind or "", ("", "token"))
    out.print(
        f"{model}: {f'{name}, ' if name else ''}{plan.layers} layers, {g.kv_heads} KV heads of"
        f" width {g.head_dim}, {g.groups} query head(s) each,"
        f" {'RoPE' if any(s.geometry.rotary for s in plan.sites) else 'no rotary positions'}"
    )
    coded = any(shape.coded for site in plan.sites for _, shape, _ in site.sides)
    what = "bytes" if coded else "numbers"
    table = table_of("layer", "keys", "values", f"{what}/{unit}", "before")
    for site in plan.sites:
        fits = (
            Fit(
                base_width=s.width,
                rank=s.rank,
                codes=s.codes if s.coded else None,
                groups=s.groups if s.groups > 1 else None,
                error=0.0,
            )
            for s in (site.keys, site.values)
        )
        after, before = site.numbers, site.numbers_before
        if coded:
            after, before = site.bytes(plan.element_size), before * plan.element_size
        sides = (fit.size(str(g.kv_heads)) for fit in fits)
        table.add_row(str(site.layer), *sides, str(after), str(before))
    out.print(table)
    _show_cost(out, Cost.from_json(plan.cache()), unit)


def _show_forms(out: Console, forms: Mapping, chosen: str, unit: str) -> None:
    """What the same budget gives in each form of keys."""
    table = table_of("--keys", f"bytes/{unit}", f"multiply-adds/{unit}", "predicted KL")
    for name, plan in forms.items():
        table.add_row(
            f"{name} *" if name == chosen else name,
            f"{plan.bytes_after:,}",
            f"{plan.flops_after // 2:,}",
            f"{plan.predicted_kl:.4f}",
        )
    out.print(table)


def _show_cost(out: Console, cache: Cost, unit: str = "token") -> None:
    """What a cached token takes: bytes to hold, flops to read in a decoding step."""
    before, after = cache.kv_flops_per_token_before, cache.kv_flops_per_token
    out.print(
        f"cache per {unit}: {in_units(cache.kv_bytes_per_token_before)} ->"
        f" {in_units(cache.kv_bytes_per_token)} ({cache.kv_ratio:.1%}); to read it:"
        f" {before / 1e3:,.0f} -> {after / 1e3:,.0f} kflop"
        f" ({after / cache.kv_bytes_per_token:,.1f} per byte)"
    )


def show_conversion(record: Record, model: str, folder: Path, layers: bool = True) -> None:
    """Per layer ranks and errors, the cache, time and memory, and the next command."""
    out, family = console_for(), family_named(record.source.model_type)
    assert family is not None  # which was converted
    for kind, fitted in record.attention.items():
        name, unit = KINDS[kind] if family.encoder else ("layer", "token")
        if layers:
            table = table_of(name, "keys", "error", "values", "error")
            for row in fitted.layers:
                table.add_row(
                    str(row.layer),
                    row.keys.size(),
                    f"{row.keys.error:.3f}",
                    row.values.size(),
                    f"{row.values.error:.3f}",
                )
            out.print(table)
        _show_cost(out, fitted.cache, unit)
        width = fitted.geometry.width
    tokens = record.calibration.tokens
    if family.encoder and 0 < tokens < width:
        out.print(
            f"calibrated on {tokens:,} target tokens, fewer than the model is wide ({width:,}): the"
            " errors say little, give more"
        )
    out.print(f"{record.seconds:.0f} s{of_memory(record.peak_memory_bytes)}")
    if layers:
        say(f"next: lrkv compare {quoted([model, str(folder)])} {measured_on(family)}")


def show_location(folder: Path) -> None:
    say(f"the converted model lies in {folder}")
