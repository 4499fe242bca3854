"""Models beside one another."""

from rich.console import Console

from lrkv_convert.device import in_units
from lrkv_convert.evaluate.words import words

from .parts import console_for, grid, table_of

SHOWN = 3  # texts of encoder-decoders that are not written as before


def show_comparison(result: dict) -> None:
    """One row per model and cache, the base first; then by text, by length of context, far apart,
    tasks, and what each writes.
    """
    out, rows = console_for(), result["models"]
    # alone there is nothing to be compared with
    names, several = [row["name"] for row in rows], len(rows) > 1
    compared = (
        [
            ("ratio", lambda r: f"×{r['ratio']:.4f}"),
            ("KL", lambda r: f"{r['kl']:.4f}"),
            ("top-1", lambda r: f"{r['top1_agreement']:.1%}"),
        ]
        if several
        else []
    )
    quality = [("perplexity", lambda r: f"{r['perplexity']:.3f}"), *compared]
    sizes = [
        ("cache/token", lambda r: in_units(r["kv_bytes_per_token_allocated"])),
        *([("of base", lambda r: f"{r['kv_ratio']:.1%}")] if several else []),
    ]
    spread = [("95 % interval", _interval)] if several else []
    for columns in (
        [[*quality[:2], *spread, *quality[2:], *sizes]]
        if out.width >= 90
        else [quality, [*spread, *sizes]]
    ):
        table = table_of("model", *(name for name, _ in columns))
        for name, row in zip(names, rows):
            table.add_row(name, *(cell(row) for _, cell in columns))
        out.print(table)
    out.print(
        f"{', '.join(t['name'] for t in result['texts'])}: {result['tokens']:,} tokens predicted,"
        f" windows of {result['seq_len']}, no BOS"
    )
    if len({row["dtype"] for row in rows}) > 1:
        stored = ", ".join(f"{row['name']}: {row['dtype']}" for row in rows if row["cache"] is None)
        out.print(f"not all in one dtype ({stored}), so that bytes do not compare: give --dtype")
    if len(result["texts"]) > 1:
        grid(
            out,
            "ratio on",
            [f"{text['name']} ({text['tokens']:,})" for text in result["texts"]],
            names,
            lambda i, j: (
                f"{rows[j]['texts'][i]['perplexity']:.3f}"
                if j == 0
                else f"×{rows[j]['texts'][i]['ratio']:.4f}"
            ),
        )
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


def show_written(result: dict) -> None:
    """Encoder-decoders: one row per model, the base first; quality, then words and caches; then
    some of what is written otherwise.
    """
    out, rows = console_for(), result["models"]
    several, judged = (
        len(rows) > 1,
        any(reference is not None for reference in result["references"]),
    )
    quality = [("perplexity", lambda r: f"{r['perplexity']:.3f}")] + (
        [
            ("ratio", lambda r: f"×{r['ratio']:.4f}"),
            ("95 % interval", _interval),
            ("KL", lambda r: f"{r['kl']:.4f}"),
            ("top-1", lambda r: f"{r['top1_agreement']:.1%}"),
        ]
        if several
        else []
    )
    spoken = (
        [("same words", lambda r: "–" if r["same_words"] is None else f"{r['same_words']:.1%}")]
        if several
        else []
    )
    spoken += (
        [("WER", lambda r: "–" if r["word_error_rate"] is None else f"{r['word_error_rate']:.1%}")]
        if judged
        else []
    )
    sizes = [
        (
            f"{title}",
            lambda r, kind=kind: (
                f"{in_units(r[f'{kind}_bytes_allocated'])} {r[f'{kind}_ratio']:.1%}"
            ),
        )
        for title, kind in (("self/token", "self"), ("cross/position", "cross"))
    ]
    for columns in (quality, spoken + sizes):
        table = table_of("model", *(name for name, _ in columns))
        for row in rows:
            table.add_row(row["name"], *(cell(row) for _, cell in columns))
        out.print(table)
    by_itself = sum(text["targets_by_the_first_model"] for text in result["texts"])
    out.print(
        f"{', '.join(text['name'] for text in result['texts'])}: {result['examples']:,} examples,"
        f" {result['tokens']:,} tokens predicted"
        f"{f'; of {by_itself:,} the target is what the first model writes' if by_itself else ''}"
    )
    if several:
        out.print(
            f"same words: of the {rows[0]['words']:,} that {rows[0]['name']} writes (of the longer"
            " text), greedily, aligned by the fewest edits, in small letters, without punctuation"
        )
    for row in rows[1:]:
        changed = [
            (name, a, b)
            for name, a, b in zip(result["names"], rows[0]["written"], row["written"])
            if words(a) != words(b)
        ]
        said = (
            f"{len(changed)} of {result['examples']} are not written as before, such as"
            if changed
            else f"all {result['examples']} are written as before"
        )
        out.print(f"\n{row['name']}: {said}")
        for name, a, b in changed[:SHOWN]:
            out.print(f"  {name}: {a}\n  {' ' * len(name)}  {b}", markup=False)


def _interval(row: dict) -> str:
    return "" if row["ratio_low"] is None else f"{row['ratio_low']:.3f}–{row['ratio_high']:.3f}"


def _by_context(out: Console, rows: list[dict]) -> None:
    """KL and agreement for predictions from ever more context."""
    buckets = [row["context"] for row in rows]
    grid(
        out,
        "KL, top-1 after",
        [
            (
                f"{b['from']:,} to {b['to']:,} tokens"
                if b["to"] > b["from"]
                else f"{b['from']:,} tokens"
            )
            for b in buckets[0]
        ],
        [row["name"] for row in rows],
        lambda i, j: f"{buckets[j][i]['kl']:.4f} {buckets[j][i]['top1_agreement']:.1%}",
    )


def _show_far(out: Console, far: dict) -> None:
    names, lengths = (
        [row["name"] for row in far["models"]],
        [f["tokens"] for f in far["models"][0]["passkey"]],
    )
    cell = lambda i, j: "{}/{}".format(
        sum(d["found"] for d in far["models"][j]["passkey"][i]["depths"]),
        len(far["models"][j]["passkey"][i]["depths"]),
    )
    grid(out, "passkey found in", [f"{length:,} tokens" for length in lengths], names, cell)
    if cell(0, 0).startswith("0/"):
        out.print("the first model does not find it either: that says nothing about the others")
    if len(names) > 1:
        out.print(f"\nIn windows of {lengths[-1]:,} tokens:")
        _by_context(out, far["models"][1:])


def _show_tasks(out: Console, tasks: list[dict]) -> None:
    names, kinds = (
        list(dict.fromkeys(row["name"] for row in tasks)),
        list(dict.fromkeys((row["task"], row["metric"]) for row in tasks)),
    )
    values = {(row["name"], row["task"], row["metric"]): row for row in tasks}

    def cell(i: int, j: int) -> str:
        row = values[(names[j], *kinds[i])]
        return f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] else "")

    grid(out, "task", [f"{task}, {metric}" for task, metric in kinds], names, cell)
