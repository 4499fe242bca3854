"""What every table is made of: the console, tables, grids, progress, an error. Tables go to stdout,
progress and errors to stderr.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lrkv_convert.device import in_units
from lrkv_convert.families import Family

from ..app import visible

WIDTH = 100  # when the output is no terminal, and at most


class Plain(Console):
    """A console that shows texts as they are: names of files are no markup, and turn no colour
    on.
    """

    def render_str(self, text: str, **how):
        return super().render_str(visible(text, kept="\n"), **how)


def console_for(stderr: bool = False) -> Console:
    probe = Console(stderr=stderr)
    return Plain(
        stderr=stderr,
        width=min(probe.width, WIDTH) if probe.is_terminal else WIDTH,
        highlight=False,
        soft_wrap=False,
        markup=False,
        emoji=False,
    )


def say(line: str) -> None:
    """One line on stdout that is not folded, so that it can be copied."""
    print(visible(line))


def measured_on(family: Family) -> str:
    """What `lrkv compare` measures such a model on, as it is typed."""
    pairs = "--audio FOLDER" if family.speech else "--pairs FILE"
    return "--text FILE" if family.encoder is None else pairs


def of_memory(count: int | None) -> str:
    """A clause on the most memory that was held; none where the system does not say."""
    return "" if count is None else f", {in_units(count)} of memory"


def show_notices(notices: list[str]) -> None:
    """What was found on the way and does no harm, a line each."""
    for notice in notices:
        print(visible(f"note: {notice}"), file=sys.stderr)


@contextmanager
def progress():
    """A callback (stage, done, total) that draws one bar per stage on stderr while it runs, if
    stderr is a terminal.
    """
    bars, console = {}, console_for(stderr=True)
    shown = Progress(
        TextColumn("{task.description:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

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


def table_of(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return table


def grid(
    out: Console, corner: str, rows: list[str], columns: list[str], cell: Callable[[int, int], str]
) -> None:
    """A table of rows by columns, in as many parts beside one another as the width makes of it.
    cell: (row, column) -> text.
    """
    room = max(1, (out.width - max(map(len, [corner, *rows]))) // 20)
    for first in range(0, len(columns), room):
        part = range(first, min(first + room, len(columns)))
        table = table_of(corner, *(columns[j] for j in part))
        for i, name in enumerate(rows):
            table.add_row(name, *(cell(i, j) for j in part))
        out.print()
        out.print(table)


def short(path: str, width: int = 30) -> str:
    name = Path(path).name
    return name if len(name) <= width else name[: width - 1] + "…"
