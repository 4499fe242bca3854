"""What the terminal shows: tables on stdout, progress and errors on stderr. The only importer of rich."""
import math
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

WIDTH = 100     # when the output is no terminal, and at most


def _console(stderr: bool = False) -> Console:
    probe = Console(stderr=stderr)
    return Console(stderr=stderr, width=min(probe.width, WIDTH) if probe.is_terminal else WIDTH, highlight=False, soft_wrap=False)


def show_error(error: Exception) -> None:
    """One line: what was found, and the hint."""
    print(f"error: {error.message}" + (f"; {error.hint}" if error.hint else ""), file=sys.stderr)


@contextmanager
def progress():
    """A callback (stage, done, total) that draws one bar per stage on stderr while it runs, if stderr is a terminal."""
    bars, console = {}, _console(stderr=True)
    shown = Progress(TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                     TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)

    def report(stage: str, done: int, total: int) -> None:
        if not bars:
            shown.start()
        if stage not in bars:
            bars[stage] = shown.add_task(stage, total=total)
        shown.update(bars[stage], completed=done)

    try:
        yield report
    finally:
        if bars:
            shown.stop()


@contextmanager
def healing(shown: bool = True):
    """(report, stage, notice) callbacks for a training run: one bar on stderr with loss, held-out ratio, speed and time left, if stderr is a
    terminal; otherwise a line for each stage and validation."""
    console, ratio = _console(stderr=True), {"text": ""}
    wide, at_terminal = console.width >= 90, console.is_terminal
    bar = Progress(TextColumn("{task.description}"), *([BarColumn(bar_width=None)] if wide else []), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                   TimeRemainingColumn(compact=True), *([TextColumn("left")] if wide else []), console=console, transient=True, disable=not (shown and at_terminal))
    task = bar.add_task("loading", total=None, figures="")

    def line_of(text: str) -> None:
        if shown:
            print(text, file=sys.stderr, flush=True)

    def stage(name: str) -> None:
        bar.update(task, description=name.partition(":")[0])
        if not at_terminal or ":" in name:
            line_of(name)

    def report(line: dict) -> None:
        if "validation_ratio" in line:
            ratio["text"] = f"held out ×{line['validation_ratio']:.4f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        if bar.tasks[0].total is None:      # a resumed run does not begin at 0, and the time left is reckoned from here
            bar.reset(task, total=line["steps"], completed=line["step"] - 1)
        bar.update(task, total=line["steps"], completed=line["step"], figures=" ".join([f"loss {line['loss']:.4f}", ratio["text"], *([speed] if wide else [])]))
        if not at_terminal and "validation_ratio" in line:
            left = (line["steps"] - line["step"]) * line["tokens"] / line["step"] / line["tokens_per_second"]
            line_of(f"step {line['step']} of {line['steps']}: loss {line['loss']:.4f}, held-out perplexity ×{line['validation_ratio']:.4f}, {speed}, {left / 60:,.1f} min left")

    with bar:
        yield report, stage, lambda text: line_of(f"note: {text}")


def show_healing(entry: dict, model: str, folder: Path) -> None:
    """Before conversion, converted, healed, on the held-out text; time; the next command."""
    out, nll, text = _console(), entry["validation"]["nll"], entry["validation"]["text"]
    base = nll.get("original", nll["converted"])
    table = _table("held-out text" if text == "held out" else ", ".join(text), "loss", "perplexity", "ratio")
    for name in ("original", "converted", "healed"):
        if name in nll:
            table.add_row(name, f"{nll[name]:.4f}", f"{math.exp(nll[name]):.3f}", f"×{math.exp(nll[name] - base):.4f}")
    out.print(table)
    if nll["healed"] >= nll["converted"]:
        out.print("Healing did not help on this text: try more tokens, or smaller learning rates.")
    elif nll.get("original", math.inf) < nll["converted"]:
        between = " (held out between the windows trained on: a text apart, as in --set validation=FILE, says less)" if text == "held out" else ""
        out.print(f"{(nll['converted'] - nll['healed']) / (nll['converted'] - nll['original']):.0%} of the lost log-perplexity is back{between}")
    speed, rounds = entry["tokens"] / entry["seconds"] if entry["seconds"] else 0, f", each window {entry['rounds']:.1f} times" if entry["rounds"] > 1 else ""
    out.print(f"{entry['tokens']:,} tokens{rounds} in {entry['seconds']:,.0f} s of training, {speed:,.0f} tokens/s, {_bytes(entry['peak_memory_bytes'])} of memory; "
              f"{entry['validation']['tokens']:,} tokens held out")
    if not entry["picture"]:
        print("pip install matplotlib for a picture of the curve")
    print(f"written: {folder}\nnext: lrkv compare {shlex.quote(entry['teacher'] or model)} {shlex.quote(model)} {shlex.quote(str(folder))} --text FILE")


def show_recipes(recipes: dict[str, dict[str, str]]) -> None:
    """Kind and name of each, and under it the command in its header, whole so that it can be copied."""
    for kind, found in recipes.items():
        for name, text in found.items():
            print(f"{kind}/{name}\n    {text.splitlines()[0].removeprefix('# ')}")
    print("lrkv recipes NAME prints one; write it to a file, change it, and give --recipe FILE")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return table


def _ranks(side: dict) -> str:
    return f"{side['base_width']} + H·{side['rank']}"


def show_plan(plan, model: str) -> None:
    """A dry run: per layer what is cached, and the sum."""
    g = plan.geometry
    out = _console()
    out.print(f"{model}: {g.layers} layers, {g.kv_heads} KV heads of width {g.head_dim}, {g.groups} query head(s) each, "
              f"{'RoPE' if g.rotary else 'no rotary positions'}")
    table = _table("layer", "keys", "values", "numbers/token", "before")
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
    out.print(f"cache per token: {_bytes(cache['kv_bytes_per_token_before'])} -> {_bytes(cache['kv_bytes_per_token'])} ({cache['kv_ratio']:.1%}); "
              f"to read it: {before / 1e3:,.0f} -> {after / 1e3:,.0f} kflop ({after / cache['kv_bytes_per_token']:,.1f} per byte)")


def show_conversion(record: dict, model: str, folder: Path, layers: bool = True) -> None:
    """Per layer ranks and errors, the cache, time and memory, and the next command."""
    out, cache = _console(), record["cache"]
    if layers:
        table = _table("layer", "keys", "error", "values", "error")
        for row in record["layers"]:
            table.add_row(str(row["layer"]), _ranks(row["keys"]), f"{row['keys']['error']:.3f}", _ranks(row["values"]), f"{row['values']['error']:.3f}")
        out.print(table)
    _show_cost(out, cache)
    out.print(f"{record['seconds']:.0f} s, {_bytes(record['peak_memory_bytes'])} of memory")
    if layers:
        print(f"next: lrkv compare {shlex.quote(model)} {shlex.quote(str(folder))} --text FILE")


def show_comparison(result: dict) -> None:
    """One row per model and cache, the base first; then by text, by length of context, far apart, tasks, and what each writes."""
    out, rows = _console(), result["models"]
    names, several = [row["name"] for row in rows], len(rows) > 1       # alone there is nothing to be compared with
    compared = [("ratio", lambda r: f"×{r['ratio']:.4f}"), ("KL", lambda r: f"{r['kl']:.4f}"), ("top-1", lambda r: f"{r['top1_agreement']:.1%}")] if several else []
    quality = [("perplexity", lambda r: f"{r['perplexity']:.3f}"), *compared]
    sizes = [("cache/token", lambda r: _bytes(r["kv_bytes_per_token_allocated"])), *([("of base", lambda r: f"{r['kv_ratio']:.1%}")] if several else [])]
    spread = [("95 % interval", _interval)] if several else []
    for columns in ([[*quality[:2], *spread, *quality[2:], *sizes]] if out.width >= 90 else [quality, [*spread, *sizes]]):
        table = _table("model", *(name for name, _ in columns))
        for name, row in zip(names, rows):
            table.add_row(name, *(cell(row) for _, cell in columns))
        out.print(table)
    out.print(f"{', '.join(t['name'] for t in result['texts'])}: {result['tokens']:,} tokens predicted, windows of {result['seq_len']}, no BOS")
    if len(result["texts"]) > 1:
        _grid(out, "ratio on", [f"{text['name']} ({text['tokens']:,})" for text in result["texts"]], names,
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
    return "" if row["ratio_low"] is None or row["kl"] == 0 else f"{row['ratio_low']:.3f}–{row['ratio_high']:.3f}"


def _grid(out: Console, corner: str, rows: list[str], columns: list[str], cell: Callable[[int, int], str]) -> None:
    """A table of rows by columns, in as many parts beside one another as the width makes of it. cell: (row, column) -> text."""
    room = max(1, (out.width - max(map(len, [corner, *rows]))) // 20)
    for first in range(0, len(columns), room):
        part = range(first, min(first + room, len(columns)))
        table = _table(corner, *(columns[j] for j in part))
        for i, name in enumerate(rows):
            table.add_row(name, *(cell(i, j) for j in part))
        out.print()
        out.print(table)


def _by_context(out: Console, rows: list[dict]) -> None:
    """KL and agreement for predictions from ever more context."""
    buckets = [row["context"] for row in rows]
    _grid(out, "KL, top-1 after", [f"{b['from']:,} to {b['to']:,} tokens" if b["to"] > b["from"] else f"{b['from']:,} tokens" for b in buckets[0]],
          [row["name"] for row in rows], lambda i, j: f"{buckets[j][i]['kl']:.4f} {buckets[j][i]['top1_agreement']:.1%}")


def _show_far(out: Console, far: dict) -> None:
    names, lengths = [row["name"] for row in far["models"]], [f["tokens"] for f in far["models"][0]["passkey"]]
    cell = lambda i, j: f"{sum(d['found'] for d in far['models'][j]['passkey'][i]['depths'])}/{len(far['models'][j]['passkey'][i]['depths'])}"
    _grid(out, "passkey found in", [f"{length:,} tokens" for length in lengths], names, cell)
    if cell(0, 0).startswith("0/"):
        out.print("the first model does not find it either: that says nothing about the others")
    if len(names) > 1:
        _by_context(out, far["models"][1:])


def _show_tasks(out: Console, tasks: list[dict]) -> None:
    names, kinds = list(dict.fromkeys(row["name"] for row in tasks)), list(dict.fromkeys((row["task"], row["metric"]) for row in tasks))
    values = {(row["name"], row["task"], row["metric"]): row for row in tasks}

    def cell(i: int, j: int) -> str:
        row = values[(names[j], *kinds[i])]
        return f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] else "")

    _grid(out, "task", [f"{task}, {metric}" for task, metric in kinds], names, cell)


def show_bench(result: dict) -> None:
    """One row per model, path, batch and context."""
    out = _console()
    table = _table("model", "path", "batch", "tokens", "ms", "tokens/s", "faster", "cache", "peak", "limit ms", "of limit", left=2)
    table.padding = (0, 1, 0, 0)
    for row in result["rows"]:
        table.add_row(_short(row["model"], 20), row["path"], str(row["batch"]), f"{row['tokens']:,}", f"{row['milliseconds']:.1f}",
                      f"{row['tokens_per_second']:,.1f}", f"×{row['speedup']:.2f}", _mib(row["cache_bytes"]), _mib(row["peak_bytes"]),
                      f"{row['limit_milliseconds']:.1f}", f"{row['of_limit']:.0%}")
    out.print(table)
    for row in result["longest"]:
        out.print(f"{row['model']} ({row['path']}), batch {row['batch']}: {row['tokens']:,} tokens fit")
    out.print(f"{result['device']}, {result['dtype']}, {result['cache']} cache. M: MiB. Limit: weights and cache moved once at the rate of a plain copy,")
    out.print(f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s read plus written.")


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}M" if count < 100 << 20 else f"{count / 2**20:,.0f}M"


def _short(path: str, width: int = 30) -> str:
    name = Path(path).name
    return name if len(name) <= width else name[: width - 1] + "…"


def show_location(folder: Path) -> None:
    print(f"the converted model lies in {folder}")


def show_sweep(result: dict, files: list[Path]) -> None:
    """Methods as rows, sizes as columns."""
    out = _console()
    points, rows = result["points"], {}
    for p in points:
        rows.setdefault(p["method"] if p["metric"] == "fisher" else f"{p['method']} ({p['metric']})", {})[p["rank"]] = p
    ranks = sorted({p["rank"] for p in points})
    table = _table("perplexity ratio at rank", *map(str, ranks))
    for name, found in rows.items():
        table.add_row(name, *(f"×{found[r]['ratio']:.3f}" for r in ranks))
    first = next(iter(rows.values()))
    table.add_row("cache of the first row", *(f"{first[r]['cache_ratio']:.0%}" for r in ranks))
    out.print(table)
    knee = f"; knee of the first row at {result['knee']:.0%}" if result["knee"] is not None else ""
    out.print(f"{result['text']['name']}: {result['tokens']:,} tokens predicted, windows of {result['seq_len']}, original perplexity "
              f"{result['base_perplexity']:.3f}{knee}")
    print("written: " + ", ".join(map(str, files)) + ("" if any(f.suffix == ".png" for f in files) else " (pip install matplotlib for the picture)"))
