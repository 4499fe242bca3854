"""What `lrkv inspect` shows, head by head."""

from collections.abc import Sequence
from pathlib import Path

from lrkv_convert.folder.markup import quoted

from .conversion import KINDS
from .parts import console_for, say, short, table_of


def _narrow(*columns: str):
    """A table of many figures: one space between columns."""
    table = table_of(*columns)
    table.padding = (0, 1, 0, 0)
    return table


def _percent(share: float) -> str:
    """Percent; nearly all and nearly nothing are not rounded to all and nothing."""
    return ">99%" if 0.995 <= share < 0.9995 else "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _or_none(value, text: str = "{}") -> str:
    return "none" if value is None else text.format(value)


def show_expectation(result: dict, calibration: list[str] | None = None) -> None:
    """An original: of each kind of attention every layer, every rank, the diversity metric, a
    recommendation; of an ablation, what predicted what; the next command. calibration: as it was
    asked for.
    """
    out, kinds = console_for(), result["attention"]
    for n, (kind, row) in enumerate(kinds.items(), 1):
        name = f"{KINDS[kind][0]}, " if len(kinds) > 1 else ""
        of, tokens = f"{short(result['model'])}: {name}", result["calibration"]["tokens"]
        _show_kind(out, of, tokens, row, explained=n == len(kinds))
        if n < len(kinds):
            out.print()
    if len(kinds) > 1:
        out.print()
        out.print("Both together, with the same rank or ratio:")
        _show_recommendation(out, result["recommended"])
    if (ratio := result["recommended"]["cache_ratio"]) is not None:
        words = ["lrkv", "convert", result["model"], "--out", "DIR", "--cache-ratio", f"{ratio:g}"]
        given = ["--calibration", *calibration] if calibration else []
        say(f"next: {quoted([*words, *given])}")


def _show_kind(out, of: str, tokens: int, row: dict, explained: bool) -> None:
    """One kind of attention. explained: whether it is said what figures mean, which is said of the
    last.
    """
    g = row["geometry"]
    out.print(
        f"{of}{g['layers']} layers, {g['kv_heads']} KV heads of width {g['head_dim']},"
        f" {g['groups']} query head(s) each; {tokens:,} tokens of calibration"
    )
    table = _narrow(
        "layer",
        "keys\nbase",
        "\n90%",
        "\n99%",
        "\nrank",
        "values\nbase",
        "\n90%",
        "\n99%",
        "\nrank",
        "diver-\nsity",
        "\ncentred",
    )
    for layer in row["layers"]:
        table.add_row(
            str(layer["layer"]),
            *_side(layer["keys"]),
            *_side(layer["values"]),
            _percent(layer["diversity"]["plain"]),
            _percent(layer["diversity"]["centred"]),
        )
    out.print(table)
    if explained:
        out.print(
            "base: energy in the attention metric that one shared base explains; 90%, 99%:"
            " dimensions that hold that much of a head; rank: the smallest within its share of the"
            " target."
        )
    _show_diversity(out, row["diversity"], explained)
    out.print()
    table = _narrow(
        "rank",
        "cache",
        "keys\nerror",
        "\nworst",
        "values\nerror",
        "\nworst",
        "predicted\nKL",
        "same bytes,\nplanned: KL",
    )
    for rank in row["ranks"]:
        table.add_row(
            str(rank["rank"]),
            f"{rank['cache_ratio']:.1%}",
            *(
                f"{rank[side][name]:.3f}"
                for side in ("keys", "values")
                for name in ("mean", "worst")
            ),
            f"{rank['predicted_kl']:.3f}",
            "no saving" if rank["cache_ratio"] >= 1 else _or_none(rank["planned_kl"], "{:.3f}"),
        )
    out.print(table)
    if explained:
        out.print(
            "Predicted KL(original || converted), nats per token, before healing: an estimate, on"
            " the low side. Measured on two models it was 1.1 to 1.6 times that, for plans 1.0 to"
            " 2.3 times, where values too had one metric for all heads; a conversion has one per"
            " head, and costs less. Perplexity is multiplied by about exp(KL) where the model reads"
            " well, and by less elsewhere."
        )
    _show_recommendation(out, row["recommended"], row["ranks"])
    if "ablation" in row:
        _show_ablation(out, row["ablation"], explained)


def _side(side: dict) -> list[str]:
    mean = lambda values: f"{sum(values) / len(values):.0f}"
    return [
        _percent(side["base_share"]),
        *(mean(values) for values in side["dimensions"].values()),
        _or_none(side["rank"]),
    ]


def _show_diversity(out, diversity: dict, explained: bool) -> None:
    meaning = " It describes; it does not measure fidelity: random heads reach the ceiling."
    out.print(
        f"Diversity of the {diversity['heads']} query heads: {diversity['plain']:.1%} of full"
        f" effective rank, centred {diversity['centred']:.1%} (ceiling"
        f" {diversity['ceiling_centred']:.1%}).{meaning if explained else ''}"
    )


def _show_recommendation(out, found: dict, ranks: Sequence[dict] = ()) -> None:
    """The smallest rank and cache ratio within the target. ranks: of this kind of attention, whose
    cache is then told.
    """
    within = f"a predicted KL of {found['target_kl']:g}"
    if found["rank"] is None:
        out.print(f"Rank: none of these that saves anything stays within {within}.")
    else:
        shares = [row["cache_ratio"] for row in ranks if row["rank"] == found["rank"]]
        cache = f", with {shares[0]:.1%} of the cache" if shares else ""
        out.print(f"Rank: {found['rank']} is the smallest within {within}{cache}.")
    if found["cache_ratio"] is None:
        out.print(f"No plan smaller than the original stays within {within} either.")
    else:
        out.print(
            f"Plan: --cache-ratio {found['cache_ratio']:g} is the smallest within it (predicted"
            f" {found['cache_ratio_kl']:.3f}), usually the better choice: layers, keys and values"
            " each get what they need."
        )


def _show_ablation(out, ablation: dict, explained: bool) -> None:
    """Rank correlations of every predictor, and the loss without the least and the most of them."""
    out.print()
    table = _narrow(
        "removed one by one", "rho\nloss", "\np", "rho\nKL", "\np", "in a\nlayer", "\np"
    )
    for row in ablation["correlations"]:
        figures = [
            _or_none(row[name], "{:+.2f}" if name.startswith("rho") else "{:.2g}")
            for name in ("rho", "p", "rho_kl", "p_kl", "rho_within", "p_within")
        ]
        table.add_row(row["predictor"], *figures)
    out.print(table)
    if explained:
        out.print(
            "rho: Spearman's rank correlation with what removing each KV head did to the loss, and"
            " to KL(whole || without); in a layer: ranked among its own layer's heads only. p: how"
            " often chance does as much."
        )
    out.print()
    sizes = ablation["removals"][0]["heads"]
    table = _narrow("loss added without", *map(str, sizes))
    for row in ablation["removals"]:
        table.add_row(
            f"{row['order']} {row['predictor']}",
            *(f"{value:+.3f}" for value in row["loss_increase"]),
        )
    out.print(table)
    out.print(
        f"heads removed together, nats per token; {ablation['text']['name']}:"
        f" {ablation['tokens']:,} tokens, loss {ablation['loss']:.3f} with all"
        f" {len(ablation['units'])} KV heads"
    )


def show_fidelity(result: dict) -> None:
    """A converted model beside its original: of each kind of attention every layer, and means."""
    out, kinds, text = console_for(), result["attention"], result["text"]
    for n, (kind, row) in enumerate(kinds.items(), 1):
        corner = KINDS[kind][0] if len(kinds) > 1 or kind != "self" else "layer"
        _show_kept(out, corner, row, explained=n == len(kinds))
        if n < len(kinds):
            out.print()
    out.print(
        f"{text['name']}: {result['tokens']:,} tokens, {short(result['original'])} and"
        f" {short(result['model'])} on the same inputs, layer by layer"
    )
    if text["calibrated_on"]:
        out.print("It was calibrated on this; something else says more.")


def _show_kept(out, corner: str, row: dict, explained: bool) -> None:
    """One kind of attention. explained: as in `_show_kind`."""
    table = _narrow(
        corner,
        "diversity\nkept",
        "\ncentred",
        "similarity\nmean",
        "\nleast",
        "logit error\nmean",
        "\nworst",
        "attention KL\nmean",
        "\nworst",
        "output\nerror",
    )
    for layer in row["layers"]:
        s, e, kl = layer["similarity"], layer["logit_error"], layer["attention_kl"]
        kept = [
            _or_none(layer["diversity"]["kept"][name], "{:.1%}") for name in ("plain", "centred")
        ]
        table.add_row(
            str(layer["layer"]),
            *kept,
            f"{sum(s) / len(s):.3f}",
            f"{min(s):.3f}",
            f"{sum(e) / len(e):.3f}",
            f"{max(e):.3f}",
            f"{sum(kl) / len(kl):.4f}",
            f"{max(kl):.4f}",
            f"{layer['output_error']:.3f}",
        )
    out.print(table)
    kept = row["diversity"]["kept"]
    out.print(
        f"mean over heads: similarity {row['similarity']:.3f}, logit error"
        f" {row['logit_error']:.3f}, attention KL {row['attention_kl']:.4f} nats; over"
        f" layers: output error {row['output_error']:.3f}"
    )
    _show_diversity(out, row["diversity"]["original"], explained)
    meaning = " Above 100% heads differ more than they did, not better."
    out.print(
        f"Kept of it: {_or_none(kept['plain'], '{:.1%}')}, centred"
        f" {_or_none(kept['centred'], '{:.1%}')}.{meaning if explained else ''}"
    )


def show_files(files: list[Path]) -> None:
    say(
        "written: "
        + ", ".join(map(str, files))
        + (
            ""
            if any(f.suffix == ".png" for f in files)
            else " (pip install matplotlib for pictures)"
        )
    )
