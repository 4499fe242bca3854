"""What `lrkv inspect` shows, head by head."""

from pathlib import Path

from lrkv_convert.folder.markup import quoted

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


def show_expectation(result: dict) -> None:
    """An original: every layer, every rank, the diversity metric, a recommendation; of an ablation,
    what predicted what.
    """
    out, g = console_for(), result["geometry"]
    out.print(
        f"{short(result['model'])}: {g['layers']} layers, {g['kv_heads']} KV heads of width"
        f" {g['head_dim']}, {g['groups']} query head(s) each; {result['calibration']['tokens']:,}"
        " tokens of calibration"
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
    for row in result["layers"]:
        table.add_row(
            str(row["layer"]),
            *_side(row["keys"]),
            *_side(row["values"]),
            _percent(row["diversity"]["plain"]),
            _percent(row["diversity"]["centred"]),
        )
    out.print(table)
    out.print(
        "base: energy in the attention metric that one shared base explains; 90%, 99%: dimensions"
        " that hold that much of a head; rank: the smallest within its share of the target."
    )
    _show_diversity(out, result["diversity"])
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
    for row in result["ranks"]:
        table.add_row(
            str(row["rank"]),
            f"{row['cache_ratio']:.1%}",
            *(
                f"{row[side][name]:.3f}"
                for side in ("keys", "values")
                for name in ("mean", "worst")
            ),
            f"{row['predicted_kl']:.3f}",
            "no saving" if row["cache_ratio"] >= 1 else _or_none(row["planned_kl"], "{:.3f}"),
        )
    out.print(table)
    out.print(
        "Predicted KL(original || converted), nats per token, before healing: an estimate, on the"
        " low side. Measured on two models it was 1.1 to 1.6 times that, for plans 1.0 to 2.3"
        " times, where values too had one metric for all heads; a conversion has one per head, and"
        " costs less. Perplexity is multiplied by about exp(KL) where the model reads well, and by"
        " less elsewhere."
    )
    _show_recommendation(out, result)
    if "ablation" in result:
        _show_ablation(out, result["ablation"])


def _side(side: dict) -> list[str]:
    mean = lambda values: f"{sum(values) / len(values):.0f}"
    return [
        _percent(side["base_share"]),
        *(mean(values) for values in side["dimensions"].values()),
        _or_none(side["rank"]),
    ]


def _show_diversity(out, diversity: dict) -> None:
    out.print(
        f"Diversity of the {diversity['heads']} query heads: {diversity['plain']:.1%} of full"
        f" effective rank, centred {diversity['centred']:.1%} (ceiling"
        f" {diversity['ceiling_centred']:.1%}). It describes; it does not measure fidelity: random"
        " heads reach the ceiling."
    )


def _show_recommendation(out, result: dict) -> None:
    """The smallest rank and cache ratio within the target, and the command, which is not folded so
    that it can be copied.
    """
    found = result["recommended"]
    within = f"a predicted KL of {found['target_kl']:g}"
    if found["rank"] is None:
        out.print(f"Rank: none of these that saves anything stays within {within}.")
    else:
        share = next(row["cache_ratio"] for row in result["ranks"] if row["rank"] == found["rank"])
        out.print(
            f"Rank: {found['rank']} is the smallest within {within}, with {share:.1%} of the cache."
        )
    if found["cache_ratio"] is None:
        out.print(f"No plan smaller than the original stays within {within} either.")
    else:
        out.print(
            f"Plan: --cache-ratio {found['cache_ratio']:g} is the smallest within it (predicted"
            f" {found['cache_ratio_kl']:.3f}), usually the better choice: layers, keys and values"
            " each get what they need."
        )
        say(
            f"next: lrkv convert {quoted([result['model']])} --out DIR --cache-ratio"
            f" {found['cache_ratio']:g}"
        )


def _show_ablation(out, ablation: dict) -> None:
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
    out.print(
        "rho: Spearman's rank correlation with what removing each KV head did to the loss, and to"
        " KL(whole || without); in a layer: ranked among its own layer's heads only. p: how often"
        " chance does as much."
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
    """A converted model beside its original: every layer, and means."""
    out = console_for()
    table = _narrow(
        "layer",
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
    for row in result["layers"]:
        s, e, kl = row["similarity"], row["logit_error"], row["attention_kl"]
        kept = [_or_none(row["diversity"]["kept"][name], "{:.1%}") for name in ("plain", "centred")]
        table.add_row(
            str(row["layer"]),
            *kept,
            f"{sum(s) / len(s):.3f}",
            f"{min(s):.3f}",
            f"{sum(e) / len(e):.3f}",
            f"{max(e):.3f}",
            f"{sum(kl) / len(kl):.4f}",
            f"{max(kl):.4f}",
            f"{row['output_error']:.3f}",
        )
    out.print(table)
    text, kept = result["text"], result["diversity"]["kept"]
    out.print(
        f"mean over heads: similarity {result['similarity']:.3f}, logit error"
        f" {result['logit_error']:.3f}, attention KL {result['attention_kl']:.4f} nats; over"
        f" layers: output error {result['output_error']:.3f}"
    )
    _show_diversity(out, result["diversity"]["original"])
    out.print(
        f"Kept of it: {_or_none(kept['plain'], '{:.1%}')}, centred"
        f" {_or_none(kept['centred'], '{:.1%}')}. Above 100% heads differ more than they did, not"
        " better."
    )
    out.print(
        f"{text['name']}: {result['tokens']:,} tokens, {short(result['original'])} and"
        f" {short(result['model'])} on the same inputs, layer by layer"
    )
    if text["calibrated_on"]:
        out.print("This is a text it was calibrated on; --text FILE with another says more.")


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
