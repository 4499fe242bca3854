"""Pictures. Needs the `plot` extra."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from .errors import LrkvError
from .folder.markup import visible
from .format import Healed, Layer, Record

MARKERS = "osD^vPX*"
TOP = 2.0  # the chart ends here: what costs more is no choice, and would flatten the rest


def frontier(result: dict, file: Path) -> None:
    """Perplexity relative to the original against cache, one line per method, the knee of the first
    marked.
    """
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
        axes.plot(
            [p["cache_ratio"] for p in points],
            [p["ratio"] for p in points],
            marker=MARKERS[i % len(MARKERS)],
            label=label,
            linewidth=2.2 if i == 0 else 1.3,
            zorder=10 - i,
        )
    if result["knee"] is not None:
        first = next(iter(lines.values()))
        height = next(p["ratio"] for p in first if p["cache_ratio"] == result["knee"])
        axes.annotate(
            "knee",
            (result["knee"], height),
            xytext=(12, 28),
            textcoords="offset points",
            arrowprops={"arrowstyle": "->"},
        )
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [
        t
        for t in ((1, 1.02, 1.05, 1.1, 1.2) if high < 1.35 else (1, 1.1, 1.2, 1.35, 1.5, 1.75, 2))
        if t <= high
    ]
    axes.set_yticks(ticks, minor=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("KV cache, share of the original")
    axes.set_ylabel("perplexity, relative to the original (log scale)")
    axes.set_title(
        f"{shown(Path(result['model']).name)} on {shown(result['text']['name'])},"
        f" {result['tokens']:,} tokens, no training"
    )
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend()
    figure.savefig(file)
    pyplot.close(figure)


# colours that people with any colour vision tell apart (Okabe and Ito 2008), strongest first
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LEAST = 1e-4  # nats of KL below which nothing is drawn to scale


def bytes_against_loss(record: dict, file: Path) -> None:
    """KL to the original against bytes of the cache, log scale, a line for each method of
    benchmarks/frontier.py with its name beside it and quantised caches' bits at their points.
    """
    figure, axes = pyplot.subplots(figsize=(8.5, 6), dpi=150, layout="constrained")
    lines: dict[str, list[dict]] = {}
    for row in record["rows"]:
        lines.setdefault(row["method"], []).append(row)
    clipped = lambda row: max(row["kl"], LEAST)
    curves, bits = {}, []
    order = list(record["methods"])  # a method looks the same in every picture
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(order)}
    for method, rows in lines.items():
        i, colour = order.index(method), colours[method]
        rows = sorted(rows, key=lambda row: row["share"])
        curves[method] = [(row["share"], clipped(row)) for row in rows]
        axes.plot(
            *zip(*curves[method]),
            marker=MARKERS[i % len(MARKERS)],
            color=colour,
            linewidth=2.6 if i == 0 else 1.3,
            markersize=7 if i == 0 else 5,
            zorder=10 - i,
        )
        bits += [
            axes.annotate(
                shown(row["setting"]),
                (row["share"], clipped(row)),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize="x-small",
                color=colour,
            )
            for row in rows
            if row["setting"].startswith("int")
        ]
    shares = [row["share"] for row in record["rows"]]
    highest = max(row["kl"] for row in record["rows"])
    axes.set_yscale("log")
    axes.set_ylim(LEAST * 0.8, highest * 2.5)
    axes.set_xlim(0, max(shares) + 0.06)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"≤{y:g}" if y <= LEAST else f"{y:g}")
    )
    axes.set_xlabel("bytes of the cache, share of a 16-bit cache, scales included")
    axes.set_ylabel("KL to the original, nats per token (log scale)")
    axes.set_title(
        f"{shown(record['model'])}: {record['tokens']:,} tokens of held-out"
        f" {'text' if record['window'] else 'speech'}, no training"
    )
    axes.grid(True, which="major", linewidth=0.4)
    labels = [shown(record["methods"][method]["label"]) for method in curves]
    figure.draw_without_rendering()  # places are known from here on
    beside(axes, list(curves.values()), labels, [colours[method] for method in curves], bits)
    figure.savefig(file)
    pyplot.close(figure)


def beside(
    axes,
    curves: Sequence[Sequence[tuple[float, float]]],
    labels: Sequence[str],
    colours: Sequence[str],
    texts: Sequence,
) -> None:
    """Each curve's label beside one of its points, in its colour: clear of other labels and of the
    texts that are there, nearer to its own curve than to any other, and near. curves: their points,
    in the order in which they were drawn.
    """
    renderer = axes.figure.canvas.get_renderer()
    traced = [_traced(axes.transData.transform(points)) for points in curves]
    boxes = [text.get_window_extent(renderer) for text in texts]
    frame = axes.get_window_extent(renderer)
    places = [
        (dx, dy, ha, va)
        for far in (9, 16, 32)
        for dx, ha in ((far, "left"), (-far, "right"), (0, "center"))
        for dy, va in ((0, "center"), (far, "bottom"), (-far, "top"))
        if dx or dy
    ]
    for i, (points, label) in enumerate(zip(curves, labels)):
        text = axes.annotate(
            label,
            points[0],
            textcoords="offset points",
            xytext=(0, 0),
            color=colours[i],
            fontsize="small",
            fontweight="bold" if i == 0 else "normal",
            zorder=20,
        )
        others = np.concatenate([np.empty((0, 2)), *traced[:i], *traced[i + 1 :]])
        costs = {}
        for place in product(points, places):
            box = _put(text, place, renderer)
            own, next_best = _distance(box, traced[i]), _distance(box, others)
            costs[place] = (
                own
                + 50 * (next_best < own)
                + 200 * (min(own, next_best) == 0)
                + 500 * sum(box.overlaps(other) for other in boxes)
                + 1000 * (not all(frame.contains(x, y) for x, y in box.corners()))
            )
        boxes.append(_put(text, min(costs, key=costs.__getitem__), renderer))


def _traced(points):
    """Pixels (n, 2) all along a line through these."""
    steps = np.linspace(0, 1, 64)[:, None]
    pieces = [a + (b - a) * steps for a, b in pairwise(points)]
    return np.concatenate(pieces) if pieces else points


def _distance(box, points) -> float:
    """In pixels from a box to the nearest of points (n, 2), 0 inside."""
    outside = np.maximum(np.maximum(box.min - points, points - box.max), 0)
    return float(np.hypot(*outside.T).min(initial=math.inf))


def _put(text, place: tuple, renderer):
    """Move an annotation to (the point it stands at, (dx, dy, alignments)); its box in pixels."""
    text.xy, (dx, dy, ha, va) = place
    text.set(position=(dx, dy), ha=ha, va=va)
    return text.get_window_extent(renderer).padded(2)


def decoding(result: dict, file: Path) -> None:
    """Time per decoded token against context, one line per model and path, one panel per batch
    size; dotted, the time the bytes take.
    """
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, panels = pyplot.subplots(
        1,
        len(batches),
        figsize=(max(6.5, 4.5 * len(batches)), 4.5),
        dpi=130,
        layout="constrained",
        squeeze=False,
    )
    for axes, batch in zip(panels[0], batches):
        lines: dict[tuple[str, str], list] = {}
        for row in result["rows"]:
            if row["batch"] == batch:
                lines.setdefault((row["model"], row["path"]), []).append(row)
        for i, ((model, path), rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda row: row["tokens"])
            label = shown(model if path == "original" else f"{model}, {path}")
            [line] = axes.plot(
                [r["tokens"] for r in rows],
                [r["milliseconds"] for r in rows],
                marker=MARKERS[i % len(MARKERS)],
                label=label,
            )
            axes.plot(
                [r["tokens"] for r in rows],
                [r["limit_milliseconds"] for r in rows],
                linestyle=":",
                color=line.get_color(),
            )
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


def healing(log: list[dict], entry: Healed, file: Path) -> None:
    """Validation perplexity, relative to the original where it is known, and training loss, against
    tokens.
    """
    steps, checks = (
        [line for line in log if "loss" in line],
        [line for line in log if "validation_nll" in line],
    )
    nll = entry.validation.nll
    per_step = entry.tokens / max(1, entry.steps)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), dpi=130, layout="constrained", sharex=True
    )
    above.plot(
        [line["step"] * per_step for line in checks],
        [math.exp(line["validation_nll"] - nll.base) for line in checks],
        marker="o",
        label="held-out text",
    )
    above.axhline(1, color="0.6", linewidth=0.8)
    above.set_ylabel(
        "perplexity, relative to\n"
        + ("the original" if "original" in nll.known else "the converted model")
    )
    above.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:.3f}"))
    below.plot(
        [line["tokens"] for line in steps],
        [line["loss"] for line in steps],
        linewidth=0.8,
        color="0.65",
        label="each step",
    )
    below.plot(
        [line["tokens"] for line in steps],
        smooth([line["loss"] for line in steps]),
        linewidth=1.8,
        label="mean of the last steps",
    )
    below.set_ylabel(
        {"kl": "KL to the original (nats)", "ce": "cross-entropy (nats)"}.get(
            entry.loss, "loss (nats)"
        )
    )
    below.set_xlabel("tokens trained on")
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for axes in (above, below):
        axes.grid(True, linewidth=0.4)
        axes.legend()
    above.set_title(
        f"healing: {entry.steps:,} steps, {entry.tokens:,} tokens,"
        f" {shown(entry.recipe['optimizer'])},"
        f" {shown(entry.precision.replace('no', 'float32'))}"
    )
    figure.savefig(file)
    pyplot.close(figure)


def cache(record: Record, name: str, file: Path) -> None:
    """What each layer caches per token, and below the relative error of its fit: numbers, base and
    residuals of keys and values, or bits by the width of codes.
    """
    fitted = record.attention["self"]
    layers, heads, width = fitted.layers, fitted.geometry.kv_heads, fitted.geometry.head_dim
    places, height = range(len(layers)), [0] * len(layers)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 5.5), dpi=130, layout="constrained", sharex=True
    )
    coded = any(layer.keys.bits is not None for layer in layers)
    before = 8 * fitted.cache.kv_bytes_per_token_before / len(layers)
    full = before if coded else 2 * heads * width
    for side, colours in (("keys", ("C0", "#9ecae1")), ("values", ("C1", "#fdd0a2"))):
        parts = code_bits(layers, side, heads) if coded else number_parts(layers, side, heads)
        shades = [(*to_rgb(colours[0]), 1 - i / len(parts)) for i in range(len(parts))]
        for (label, numbers), shade, hatched in zip(
            parts.items(), shades if coded else colours, (False, not coded, *[False] * len(parts))
        ):
            above.bar(
                places,
                numbers,
                bottom=height,
                color=shade,
                hatch="///" if hatched else None,
                edgecolor="white",
                linewidth=0,
                label=label,
            )
            height = [a + b for a, b in zip(height, numbers)]
        below.plot(
            places,
            [getattr(layer, side).error for layer in layers],
            marker=MARKERS[side == "values"],
            color=colours[0],
            label=side,
        )
    above.axhline(full, color="0.4", linestyle="--", linewidth=1, label="the original")
    above.set_ylabel("bits cached per token" if coded else "numbers cached per token")
    above.set_ylim(0, full * (1.6 if coded else 1.35))  # room for the legend
    above.set_xlim(-0.8, len(layers) - 0.2)
    above.set_title(f"{shown(name)}: {fitted.cache.kv_ratio:.1%} of the original's cache")
    above.legend(fontsize="small", ncols=3, loc="upper center")
    below.set_ylabel("relative error of the fit\n(in its metric)")
    below.set_ylim(bottom=0)
    below.set_xlabel("layer")
    below.legend(fontsize="small")
    for axes in (above, below):
        axes.grid(True, axis="y", linewidth=0.4)
    figure.savefig(file)
    pyplot.close(figure)


def number_parts(layers: Sequence[Layer], side: str, heads: int) -> dict[str, list[int]]:
    """Numbers by layer, of base and of residuals, by what they are called."""
    sides = [getattr(layer, side) for layer in layers]
    return {
        f"{side}, shared base": [each.base_width for each in sides],
        f"{side}, residuals of all heads": [heads * each.rank for each in sides],
    }


def code_bits(layers: Sequence[Layer], side: str, heads: int) -> dict[str, list[int]]:
    """Bits by layer, of latents of each width, by what they are called; scales left out."""
    found: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        fit = getattr(layer, side)
        slots: Sequence[Any] = fit.codes or ()
        for times, blocks in zip((fit.groups or 1, heads), slots, strict=False):
            for bits, count in blocks or ():
                of_width = found.setdefault(bits, [0] * len(layers))
                of_width[i] += times * bits * count
    return {f"{side}, {bits} bits each": found[bits] for bits in sorted(found, reverse=True)}


def comparison(rows: list[dict], file: BinaryIO) -> None:
    """Perplexity ratio against cache for every row but the base, with its confidence interval."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, row in enumerate(rows[1:]):
        spread = (
            None
            if row["ratio_low"] is None
            else [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
        )
        axes.errorbar(
            row["kv_ratio"],
            row["ratio"],
            yerr=spread,
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            capsize=4,
            label=shown(row["name"]),
        )
    axes.plot(
        1, 1, marker="*", markersize=12, linestyle="none", color="0.3", label=shown(rows[0]["name"])
    )
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_xlim(0, max(1.05, 1.05 * max(row["kv_ratio"] for row in rows)))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:.3f}"))
    axes.set_xlabel("cached bytes per token, share of the original's")
    axes.set_ylabel("perplexity, relative to the original\n(bars: 95 % interval)")
    axes.grid(True, linewidth=0.4)
    axes.legend(fontsize="small")
    figure.savefig(file, format="svg")
    pyplot.close(figure)


def by_context(rows: list[dict], file: BinaryIO) -> None:
    """KL to the original and perplexity ratio against the tokens of context before the prediction
    (evaluate/statistics.by_context).
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, row in enumerate(rows):
        buckets = row["context"]
        middles = [math.sqrt(bucket["from"] * bucket["to"]) for bucket in buckets]
        for axes, key in zip(panels, ("kl", "ratio")):
            axes.plot(
                middles,
                [bucket[key] for bucket in buckets],
                marker=MARKERS[i % len(MARKERS)],
                label=shown(row["name"]),
            )
    edges = [bucket["from"] for bucket in rows[0]["context"]] + [rows[0]["context"][-1]["to"]]
    for axes, label in zip(
        panels, ("KL to the original (nats)", "perplexity, relative to the original")
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            edges, [f"{edge / 1024:.0f}K" if edge >= 1000 else str(edge) for edge in edges]
        )
        axes.set_xlabel("tokens of context before the prediction")
        axes.set_ylabel(label)
        axes.grid(True, linewidth=0.4)
    panels[0].set_ylim(bottom=0)
    panels[1].axhline(1, color="0.6", linewidth=0.8)
    panels[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"×{y:.3f}"))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
    )
    figure.savefig(file, format="svg")
    pyplot.close(figure)


def shown(name: str) -> str:
    """A name in a picture: without formulas, without what the font cannot draw, and not left out,
    as matplotlib does with labels that begin with an underscore.
    """
    known = _characters()
    text = "".join(c if ord(c) in known else "□" for c in visible(name)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@lru_cache
def _characters() -> set[int]:
    """What the font can draw."""
    return set(
        font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    )


def check_format(file: Path) -> None:
    """Raise LrkvError for a picture of a kind that matplotlib does not write."""
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if (kind := file.suffix.lower().removeprefix(".")) not in known:
        raise LrkvError(
            f"{file} is no picture: its name ends in {kind!r}",
            f"let it end in one of {', '.join(sorted(known))}",
        )


def smooth(values: list[float]) -> list[float]:
    """Mean over the last tenth of what came before each value."""
    width = max(1, len(values) // 10)
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))
    ]
