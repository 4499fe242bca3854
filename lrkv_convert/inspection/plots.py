"""Pictures of heads. Needs the `plot` extra."""

from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from ..plot import MARKERS, shown


def spectra_map(result: dict, file: Path) -> None:
    """Layer x KV head, keys and values: what of a head the shared base leaves out, and how many
    dimensions hold nearly all of it. A row of panels for each kind of attention.
    """
    kinds = result["attention"]
    first = next(iter(kinds.values()))
    figure, grid = _panels(kinds, 4, first["geometry"]["kv_heads"])
    for row, panels in zip(kinds.values(), grid):
        layers, d = row["layers"], row["geometry"]["head_dim"]
        share = list(layers[0]["keys"]["dimensions"])[-1]
        # keys and values differ by orders of magnitude: a scale each
        for axes, side in zip(panels, ("keys", "values")):
            outside = numpy.array([layer[side]["outside_base"] for layer in layers]) * 100
            _heat(
                figure,
                axes,
                outside,
                f"{side}: energy outside\nthe shared base",
                "% of the head's energy",
                Normalize(0, max(outside.max(), 1e-9)),
            )
        for axes, side in zip(panels[2:], ("keys", "values")):
            _heat(
                figure,
                axes,
                numpy.array([layer[side]["dimensions"][share] for layer in layers]),
                f"{side}: dimensions for\n{share} of the energy",
                f"dimensions of {d}",
                Normalize(0, d),
            )
    _finish(
        figure,
        kinds,
        grid,
        "KV head",
        f"{shown(Path(result['model']).name)}: heads in the attention metric",
        file,
    )


def fidelity_map(result: dict, file: Path) -> None:
    """Layer x query head: similarity, logit error and attention KL. A row of panels for each kind
    of attention.
    """
    kinds = result["attention"]
    first = next(iter(kinds.values()))
    figure, grid = _panels(kinds, 3, len(first["layers"][0]["similarity"]))
    for row, panels in zip(kinds.values(), grid):
        similarity, error, kl = (
            numpy.array([layer[name] for layer in row["layers"]])
            for name in ("similarity", "logit_error", "attention_kl")
        )
        _heat(
            figure,
            panels[0],
            similarity,
            "similarity s(A, Â)",
            "cosine, 1 = the same",
            Normalize(min(similarity.min(), 0.999), 1),
            "viridis_r",
        )
        _heat(
            figure,
            panels[1],
            error * 100,
            "logit error",
            "% of the centred logits",
            Normalize(0, max(error.max() * 100, 1e-9)),
        )
        kl = kl.clip(1e-12)
        low, high = max(kl.min(), kl.max() * 1e-4), kl.max()
        _heat(
            figure,
            panels[2],
            kl,
            "attention KL",
            "nats per query (log scale)",
            LogNorm(low, max(high, low * 1.01)),
        )
    _finish(
        figure,
        kinds,
        grid,
        "query head",
        f"{shown(Path(result['model']).name)} beside its original, {result['tokens']:,} tokens of"
        f" {shown(result['text']['name'])}",
        file,
    )


def ablation_curves(result: dict, file: Path) -> None:
    """Loss against the number of heads removed: the least first, the most first; a line for each
    predictor. A row of panels for each kind of attention.
    """
    kinds = {kind: row["ablation"] for kind, row in result["attention"].items()}
    figure, grid = pyplot.subplots(
        len(kinds), 2, figsize=(11, 4.8 * len(kinds)), dpi=130, layout="constrained", squeeze=False
    )
    for (kind, ablation), panels in zip(kinds.items(), grid):
        for axes, order in zip(panels, ("least", "most")):
            rows = [row for row in ablation["removals"] if row["order"] == order]
            for i, row in enumerate(rows):
                dashed = row["predictor"] in ("random", "measured alone")
                axes.plot(
                    row["heads"],
                    row["loss_increase"],
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle="--" if dashed else "-",
                    color={"random": "0.6", "measured alone": "black"}.get(
                        row["predictor"], f"C{i}"
                    ),
                    label=row["predictor"],
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_xticks(rows[0]["heads"], [str(n) for n in rows[0]["heads"]])
            axes.axhline(0, color="0.6", linewidth=0.8)
            axes.set_title(f"{_of(kinds, kind)}{order} first")
            axes.set_xlabel(f"KV heads removed together, of {len(ablation['units'])}")
            axes.grid(True, which="major", linewidth=0.4)
        added = [value for row in ablation["removals"] for value in row["loss_increase"]]
        for axes in panels:
            axes.set_ylim(min([*added, 0]) - 0.02, max([*added, 0.1]) * 1.5)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panels[0].set_ylabel("loss added, nats per token (linear below 0.1, then log)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ablation = next(iter(kinds.values()))
    figure.suptitle(
        f"{shown(Path(result['model']).name)} without heads, {ablation['tokens']:,} tokens of"
        f" {shown(ablation['text']['name'])}"
    )
    figure.savefig(file)
    pyplot.close(figure)


def _of(kinds: dict, kind: str) -> str:
    """What a row of panels says of its kind of attention where there are several."""
    return f"{kind}-attention, " if len(kinds) > 1 else ""


def _panels(kinds: dict, count: int, heads: int):
    """A row of panels for each kind of attention, tall enough for its layers and wide enough for
    the heads.
    """
    tall = [max(3.2, min(0.2 * len(row["layers"]) + 1.6, 12)) for row in kinds.values()]
    return pyplot.subplots(
        len(kinds),
        count,
        figsize=(count * max(2.3, min(0.16 * heads + 1.6, 5)), sum(tall)),
        dpi=130,
        layout="constrained",
        sharey="row",
        squeeze=False,
        height_ratios=tall,
    )


def _heat(figure, axes, grid, title: str, unit: str, norm, colours: str = "viridis") -> None:
    """One panel: rows are layers, columns heads."""
    image = axes.imshow(grid, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    figure.colorbar(
        image, ax=axes, orientation="horizontal", location="bottom", label=unit, pad=0.02
    )
    axes.set_title(title, fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _finish(figure, kinds: dict, grid, heads: str, title: str, file: Path) -> None:
    for kind, panels in zip(kinds, grid):
        for axes in panels:
            axes.set_xlabel(heads)
        panels[0].set_ylabel(f"{_of(kinds, kind)}layer")
    figure.suptitle(title, fontsize=11)
    figure.savefig(file)
    pyplot.close(figure)
