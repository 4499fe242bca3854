"""Training: what is seen while it runs, and what came of it."""

import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrkv_convert.families import Family
from lrkv_convert.folder.markup import quoted
from lrkv_convert.format import Healed

from ..app import visible
from .parts import console_for, measured_on, of_memory, say, table_of


@contextmanager
def healing(shown: bool = True):
    """(report, stage, notice) callbacks for a training run: one bar on stderr with loss, held-out
    ratio, speed and time left, if stderr is a terminal; otherwise a line for each stage and
    validation.
    """
    console, ratio = console_for(stderr=True), {"text": ""}
    wide, at_terminal = console.width >= 90, console.is_terminal
    bar = Progress(
        TextColumn("{task.description}"),
        *([BarColumn(bar_width=None)] if wide else []),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        *([TextColumn("left")] if wide else []),
        console=console,
        transient=True,
        disable=not (shown and at_terminal),
    )
    task = bar.add_task("loading", total=None, figures="")

    def line_of(text: str) -> None:
        if shown:
            print(visible(text), file=sys.stderr, flush=True)

    def stage(name: str) -> None:
        bar.update(task, description=name.partition(":")[0])
        if not at_terminal or ":" in name:
            line_of(name)

    def report(line: dict) -> None:
        if "validation_ratio" in line:
            ratio["text"] = f"held out ×{line['validation_ratio']:.4f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        # a resumed run does not begin at 0, and the time left is reckoned from here
        if bar.tasks[0].total is None:
            bar.reset(task, total=line["steps"], completed=line["step"] - 1)
        bar.update(
            task,
            total=line["steps"],
            completed=line["step"],
            figures=" ".join(
                [f"loss {line['loss']:.4f}", ratio["text"], *([speed] if wide else [])]
            ),
        )
        if not at_terminal and "validation_ratio" in line:
            left = (
                (line["steps"] - line["step"])
                * line["tokens"]
                / line["step"]
                / line["tokens_per_second"]
            )
            line_of(
                f"step {line['step']} of {line['steps']}: loss {line['loss']:.4f}, held-out"
                f" perplexity ×{line['validation_ratio']:.4f}, {speed}, {left / 60:,.1f} min left"
            )

    with bar:
        yield report, stage, lambda text: line_of(f"note: {text}")


def show_healing(entry: Healed, model: str, folder: Path, family: Family) -> None:
    """Before conversion, converted, healed, on the held-out text; time; the next command."""
    out, nll, text = console_for(), entry.validation.nll, entry.validation.text
    between = isinstance(text, str)  # what was trained on
    name = "held-out text" if between else ", ".join(text)
    table = table_of(name, "loss", "perplexity", "ratio")
    for each, loss in nll.known.items():
        table.add_row(
            each,
            f"{loss:.4f}",
            f"{math.exp(loss):.3f}",
            f"×{math.exp(loss - nll.base):.4f}",
        )
    out.print(table)
    if nll.healed >= nll.converted:
        out.print("Healing did not help on this text: try more tokens, or smaller learning rates.")
    elif nll.base < nll.converted:
        remark = (
            " (held out between what was trained on: a text apart, as in --set validation=FILE,"
            " says less)"
            if between
            else ""
        )
        back = (nll.converted - nll.healed) / (nll.converted - nll.base)
        out.print(f"{back:.0%} of the lost log-perplexity is back{remark}")
    speed = entry.tokens / entry.seconds if entry.seconds else 0
    rounds = f", each {entry.rounds:.1f} times" if entry.rounds > 1 else ""
    out.print(
        f"{entry.tokens:,} tokens{rounds} in {entry.seconds:,.0f} s of training, {speed:,.0f}"
        f" tokens/s{of_memory(entry.peak_memory_bytes)};"
        f" {entry.validation.tokens:,} tokens held out"
    )
    if not entry.picture:
        print("pip install matplotlib for a picture of the curve")
    say(f"written: {folder}")
    models = quoted([entry.teacher or model, model, str(folder)])
    say(f"next: lrkv compare {models} {measured_on(family)}")


def show_recipes(recipes: dict[str, dict[str, str]]) -> None:
    """Kind and name of each, and under it the command in its header, on one line so that it can be
    copied.
    """
    for kind, found in recipes.items():
        for name, text in found.items():
            command = re.sub(r"\\\n# +", "", text).splitlines()[0].removeprefix("# ")
            print(f"{kind}/{name}\n    {command}")
    print("lrkv recipes NAME prints one; write it to a file, change it, and give --recipe FILE")
