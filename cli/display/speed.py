"""Time per token, and the frontier of many conversions."""

from pathlib import Path

from .parts import console_for, say, short, table_of


def show_bench(result: dict) -> None:
    """One row per model, path, batch and context."""
    out = console_for()
    table = table_of(
        "model",
        "path",
        "batch",
        "tokens",
        "ms",
        "tokens/s",
        "faster",
        "cache",
        "peak",
        "limit ms",
        "of limit",
        left=2,
    )
    table.padding = (0, 1, 0, 0)
    for row in result["rows"]:
        table.add_row(
            short(row["model"], 20),
            row["path"],
            str(row["batch"]),
            f"{row['tokens']:,}",
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.1f}",
            f"×{row['speedup']:.2f}",
            _mib(row["cache_bytes"]),
            _mib(row["peak_bytes"]),
            f"{row['limit_milliseconds']:.1f}",
            f"{row['of_limit']:.0%}",
        )
    out.print(table)
    for row in result["longest"]:
        out.print(
            f"{row['model']} ({row['path']}), batch {row['batch']}: {row['tokens']:,} tokens fit"
        )
    out.print(
        f"{result['device']}, {result['dtype']}, {result['cache']} cache. M: MiB. Limit: weights"
        " and cache moved once at the rate of a plain copy,"
    )
    out.print(f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s read plus written.")
    for positions in dict.fromkeys(row["positions"] for row in result["rows"]):
        if positions is not None:
            out.print(f"The cache includes that of cross-attention, {positions:,} positions.")


def _mib(count: int | None) -> str:
    return (
        ""
        if count is None
        else f"{count / 2**20:,.1f}M"
        if count < 100 << 20
        else f"{count / 2**20:,.0f}M"
    )


def show_sweep(result: dict, files: list[Path]) -> None:
    """Methods as rows, sizes as columns."""
    out = console_for()
    points, rows = result["points"], {}
    for p in points:
        rows.setdefault(
            p["method"] if p["metric"] == "fisher" else f"{p['method']} ({p['metric']})", {}
        )[p["rank"]] = p
    ranks = sorted({p["rank"] for p in points})
    table = table_of("perplexity ratio at rank", *map(str, ranks))
    for name, found in rows.items():
        table.add_row(name, *(f"×{found[r]['ratio']:.3f}" for r in ranks))
    first = next(iter(rows.values()))
    table.add_row("cache of the first row", *(f"{first[r]['cache_ratio']:.0%}" for r in ranks))
    out.print(table)
    knee = f"; knee of the first row at {result['knee']:.0%}" if result["knee"] is not None else ""
    windows = f", windows of {result['seq_len']}" if result["seq_len"] else ""
    out.print(
        f"{result['text']['name']}: {result['tokens']:,} tokens predicted{windows}, original"
        f" perplexity {result['base_perplexity']:.3f}{knee}"
    )
    say(
        "written: "
        + ", ".join(map(str, files))
        + (
            ""
            if any(f.suffix == ".png" for f in files)
            else " (pip install matplotlib for the picture)"
        )
    )
