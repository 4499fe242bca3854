"""Models beside one another."""
from rich.console import Console

from lrkv_convert.device import in_units

from .parts import console_for, grid, table_of


def show_comparison(result: dict) -> None:
    """One row per model and cache, the base first; then by text, by length of context, far apart, tasks, and what each writes."""
    out, rows = console_for(), result["models"]
    names, several = [row["name"] for row in rows], len(rows) > 1       # alone there is nothing to be compared with
    compared = [("ratio", lambda r: f"×{r['ratio']:.4f}"), ("KL", lambda r: f"{r['kl']:.4f}"), ("top-1", lambda r: f"{r['top1_agreement']:.1%}")] if several else []
    quality = [("perplexity", lambda r: f"{r['perplexity']:.3f}"), *compared]
    sizes = [("cache/token", lambda r: in_units(r["kv_bytes_per_token_allocated"])), *([("of base", lambda r: f"{r['kv_ratio']:.1%}")] if several else [])]
    spread = [("95 % interval", _interval)] if several else []
    for columns in ([[*quality[:2], *spread, *quality[2:], *sizes]] if out.width >= 90 else [quality, [*spread, *sizes]]):
        table = table_of("model", *(name for name, _ in columns))
        for name, row in zip(names, rows):
            table.add_row(name, *(cell(row) for _, cell in columns))
        out.print(table)
    out.print(f"{', '.join(t['name'] for t in result['texts'])}: {result['tokens']:,} tokens predicted, windows of {result['seq_len']}, no BOS")
    if len({row["dtype"] for row in rows}) > 1:
        stored = ", ".join(f"{row['name']}: {row['dtype']}" for row in rows if row["cache"] is None)
        out.print(f"not all in one dtype ({stored}), so that bytes do not compare: give --dtype")
    if len(result["texts"]) > 1:
        grid(out, "ratio on", [f"{text['name']} ({text['tokens']:,})" for text in result["texts"]], names,
              lambda i, j: f"{rows[j]['texts'][i]['perplexity']:.3f}" if j == 0 else f"×{rows[j]['texts'][i]['ratio']:.4f}")
    if several and len(rows[0]["context"]) > 1:
        _by_context(out, rows[1:])
    if "long_context" in result:
        _show_far(out, result["long_context"])
    if result.get("tasks"):
        _show_tasks(out, result["tasks"])
    for sample in result.get("samples", []):
        out.print()
        out.print(f'"{" ".join(sample["prompt"].split())} …"', markup=False)
        for name, text in zip(names, sample["continuations"]):
            out.print(f"  {name}: … {' '.join(text.split())}", markup=False)


def _interval(row: dict) -> str:
    return "" if row["ratio_low"] is None else f"{row['ratio_low']:.3f}–{row['ratio_high']:.3f}"


def _by_context(out: Console, rows: list[dict]) -> None:
    """KL and agreement for predictions from ever more context."""
    buckets = [row["context"] for row in rows]
    grid(out, "KL, top-1 after", [f"{b['from']:,} to {b['to']:,} tokens" if b["to"] > b["from"] else f"{b['from']:,} tokens" for b in buckets[0]],
          [row["name"] for row in rows], lambda i, j: f"{buckets[j][i]['kl']:.4f} {buckets[j][i]['top1_agreement']:.1%}")


def _show_far(out: Console, far: dict) -> None:
    names, lengths = [row["name"] for row in far["models"]], [f["tokens"] for f in far["models"][0]["passkey"]]
    cell = lambda i, j: f"{sum(d['found'] for d in far['models'][j]['passkey'][i]['depths'])}/{len(far['models'][j]['passkey'][i]['depths'])}"
    grid(out, "passkey found in", [f"{length:,} tokens" for length in lengths], names, cell)
    if cell(0, 0).startswith("0/"):
        out.print("the first model does not find it either: that says nothing about the others")
    if len(names) > 1:
        out.print(f"\nIn windows of {lengths[-1]:,} tokens:")
        _by_context(out, far["models"][1:])


def _show_tasks(out: Console, tasks: list[dict]) -> None:
    names, kinds = list(dict.fromkeys(row["name"] for row in tasks)), list(dict.fromkeys((row["task"], row["metric"]) for row in tasks))
    values = {(row["name"], row["task"], row["metric"]): row for row in tasks}

    def cell(i: int, j: int) -> str:
        row = values[(names[j], *kinds[i])]
        return f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] else "")

    grid(out, "task", [f"{task}, {metric}" for task, metric in kinds], names, cell)
