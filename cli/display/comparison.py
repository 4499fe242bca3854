"""Models beside one another."""

from collections.abc import Callable

from rich.console import Console

from lrkv_convert.device import in_units
from lrkv_convert.evaluate.words import words

from .parts import console_for, grid, table_of

Column = tuple[str, Callable[[dict], str]]  # title, and what a row has there
SHOWN = 3  # texts of encoder-decoders that are not written as before


def show_comparison(result: dict) -> None:
    """One row per model and cache, the base first; then by text, by length of context, and whatever
    else was looked at.
    """
    out, rows = console_for(), result["models"]
    # alone there is nothing to be compared with
    names, several = [row["name"] for row in rows], len(rows) > 1
    for columns in _columns(result, out.width):
        table = table_of("model", *(name for name, _ in columns))
        for name, row in zip(names, rows):
            table.add_row(name, *(cell(row) for _, cell in columns))
        out.print(table)
    out.print(_what_was_read(result))
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
    if "retrieval" in result:
        _show_retrieval(out, result["retrieval"])
    if result.get("tasks"):
        _show_tasks(out, result["tasks"])
    for sample in result.get("samples", []):
        out.print()
        out.print(f'"{" ".join(sample["prompt"].split())} …"', markup=False)
        for name, text in zip(names, sample["continuations"]):
            out.print(f"  {name}: … {' '.join(text.split())}", markup=False)
    if several and "references" in result:
        _show_written(out, result)


def _columns(result: dict, width: int) -> list[list[Column]]:
    """Of one table, or of several where one would not fit in the width."""
    several = len(result["models"]) > 1
    share = lambda value: "–" if value is None else f"{value:.1%}"
    quality: list[Column] = [("perplexity", lambda r: f"{r['perplexity']:.3f}")]
    spread: list[Column] = []
    if several:
        spread = [("95 % interval", _interval)]
        quality += [
            ("ratio", lambda r: f"×{r['ratio']:.4f}"),
            ("KL", lambda r: f"{r['kl']:.4f}"),
            ("top-1", lambda r: f"{r['top1_agreement']:.1%}"),
        ]
    whole = [*quality[:2], *spread, *quality[2:]]
    if "references" not in result:
        sizes: list[Column] = [
            ("cache/token", lambda r: in_units(r["caches"]["self"]["allocated"]))
        ]
        if several:
            sizes += [("of base", lambda r: share(r["caches"]["self"]["ratio"]))]
        return [[*whole, *sizes]] if width >= 90 else [quality, [*spread, *sizes]]
    spoken: list[Column] = []
    if several:
        spoken += [("same words", lambda r: share(r["same_words"]))]
    if any(reference is not None for reference in result["references"]):
        spoken += [("WER", lambda r: share(r["word_error_rate"]))]
    for title, kind in (("self/token", "self"), ("cross/position", "cross")):
        spoken += [(title, lambda r, kind=kind: _size(r["caches"][kind], several))]
    return [whole, spoken] if several or width < 60 else [[*whole, *spoken]]


def _size(cache: dict, several: bool) -> str:
    return in_units(cache["allocated"]) + (f" {cache['ratio']:.1%}" if several else "")


def _what_was_read(result: dict) -> str:
    names, tokens = ", ".join(text["name"] for text in result["texts"]), result["tokens"]
    if "references" not in result:
        windows = f"windows of {result['seq_len']}, no BOS"
        return f"{names}: {tokens:,} tokens predicted, {windows}"
    by_itself = sum(text["targets_by_the_first_model"] for text in result["texts"])
    said = f"; of {by_itself:,} the target is what the first model writes" if by_itself else ""
    return f"{names}: {result['examples']:,} examples, {tokens:,} tokens predicted{said}"


def _show_written(out: Console, result: dict) -> None:
    """Some of what models do not write as the first one does."""
    base, *others = result["models"]
    out.print(
        f"same words: of the {base['words']:,} that {base['name']} writes (of the longer text),"
        " greedily, aligned by the fewest edits, in small letters, without punctuation"
    )
    for row in others:
        changed = [
            (name, a, b)
            for name, a, b in zip(result["names"], base["written"], row["written"])
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


def _show_retrieval(out: Console, asked: dict) -> None:
    """Loss of the answers of each task, beside the first model's, and how many were found."""
    rows = asked["models"]
    base = rows[0]["tasks"]
    several = len({row["tokens"] for row in base}) > 1
    labels = [
        f"{row['task']}, {row['haystack']}" + (f", {row['tokens']:,}" if several else "")
        for row in base
    ]

    def cell(i: int, j: int) -> str:
        own = rows[j]["tasks"][i]
        ratio = f" ×{own['nll'] / base[i]['nll']:.2f}" if j and base[i]["nll"] > 0 else ""
        return f"{own['nll']:.3f}{ratio} {own['found']}/{own['asked']}"

    grid(out, "retrieval", labels, [row["name"] for row in rows], cell)
    lengths = " and ".join(f"{n:,}" for n in sorted({row["tokens"] for row in base}))
    out.print(
        f"nats of an answer's token, beside those of {rows[0]['name']}, and answers found, in"
        f" {asked['texts']} texts of {lengths} tokens each: {asked['prose']}, or filler"
    )


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
