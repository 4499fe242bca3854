"""Pictures. Needs the `plot` extra."""
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter  # noqa: E402

MARKERS = "osD^vPX*"
TOP = 2.0       # the chart ends here: what costs more is no choice, and would flatten the rest


def frontier(result: dict, file: Path) -> None:
    """Perplexity relative to the original against cache, one line per method, the knee of the first marked."""
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=130, layout="constrained")
    lines: dict[tuple[str, str], list] = {}
    for point in result["points"]:
        lines.setdefault((point["method"], point["metric"]), []).append(point)
    ratios = [p["ratio"] for p in result["points"]]
    low, high = min(0.985, min(ratios) * 0.985), max(1.1, min(TOP, max(ratios) * 1.05))
    for i, ((method, metric), points) in enumerate(lines.items()):
        points = sorted(points, key=lambda p: p["cache_ratio"])
        label = method if metric == "fisher" else f"{method} ({metric})"
        if beyond := sum(p["ratio"] > high for p in points):
            label += f": {beyond} of {len(points)} above the chart"
        axes.plot([p["cache_ratio"] for p in points], [p["ratio"] for p in points], marker=MARKERS[i % len(MARKERS)], label=label,
                  linewidth=2.2 if i == 0 else 1.3, zorder=10 - i)
    if result["knee"] is not None:
        first = next(iter(lines.values()))
        height = next(p["ratio"] for p in first if p["cache_ratio"] == result["knee"])
        axes.annotate("knee", (result["knee"], height), xytext=(12, 28), textcoords="offset points", arrowprops={"arrowstyle": "->"})
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [t for t in ((1, 1.02, 1.05, 1.1, 1.2) if high < 1.35 else (1, 1.1, 1.2, 1.35, 1.5, 1.75, 2)) if t <= high]
    axes.set_yticks(ticks, minor=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("KV cache, share of the original")
    axes.set_ylabel("perplexity, relative to the original (log scale)")
    axes.set_title(f"{Path(result['model']).name} on {result['text']['name']}, {result['tokens']:,} tokens, no training")
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend()
    figure.savefig(file)
    pyplot.close(figure)


def decoding(result: dict, file: Path) -> None:
    """Time per decoded token against context, one line per model and path, one panel per batch size; dotted, the time the bytes take."""
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(max(6.5, 4.5 * len(batches)), 4.5), dpi=130, layout="constrained", squeeze=False)
    for axes, batch in zip(panels[0], batches):
        lines: dict[tuple[str, str], list] = {}
        for row in result["rows"]:
            if row["batch"] == batch:
                lines.setdefault((row["model"], row["path"]), []).append(row)
        for i, ((model, path), rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda row: row["tokens"])
            label = model if path == "original" else f"{model}, {path}"
            [line] = axes.plot([r["tokens"] for r in rows], [r["milliseconds"] for r in rows], marker=MARKERS[i % len(MARKERS)], label=label)
            axes.plot([r["tokens"] for r in rows], [r["limit_milliseconds"] for r in rows], linestyle=":", color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks = sorted({row["tokens"] for row in result["rows"]})
        axes.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else f"{t:,}" for t in ticks])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("ms per step (dotted: moving the bytes)")
        axes.grid(True, which="major", linewidth=0.4)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Decoding, {result['device']}, {result['dtype']}")
    figure.savefig(file)
    pyplot.close(figure)


def healing(log: list[dict], entry: dict, file: Path) -> None:
    """Validation perplexity, relative to the original where it is known, and training loss, against tokens."""
    steps, checks = [line for line in log if "loss" in line], [line for line in log if "validation_nll" in line]
    per_step = entry["tokens"] / max(1, entry["steps"])
    base = entry["validation"]["nll"].get("original", entry["validation"]["nll"]["converted"])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), dpi=130, layout="constrained", sharex=True)
    above.plot([line["step"] * per_step for line in checks], [math.exp(line["validation_nll"] - base) for line in checks], marker="o", label="held-out text")
    above.axhline(1, color="0.6", linewidth=0.8)
    above.set_ylabel("perplexity, relative to\n" + ("the original" if "original" in entry["validation"]["nll"] else "the converted model"))
    above.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:.3f}"))
    below.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], linewidth=0.8, color="0.65", label="each step")
    below.plot([line["tokens"] for line in steps], smooth([line["loss"] for line in steps]), linewidth=1.8, label="mean of the last steps")
    below.set_ylabel({"kl": "KL to the original (nats)", "ce": "cross-entropy (nats)"}.get(entry["loss"], "loss (nats)"))
    below.set_xlabel("tokens trained on")
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for axes in (above, below):
        axes.grid(True, linewidth=0.4)
        axes.legend()
    above.set_title(f"healing: {entry['steps']:,} steps, {entry['tokens']:,} tokens, {entry['recipe']['optimizer']}, {entry['precision'].replace('no', 'float32')}")
    figure.savefig(file)
    pyplot.close(figure)


def smooth(values: list[float]) -> list[float]:
    """Mean over the last tenth of what came before each value."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i - width + 1):i + 1]) / min(width, i + 1) for i in range(len(values))]
