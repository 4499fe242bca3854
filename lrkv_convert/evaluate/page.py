"""A comparison as one HTML page that needs nothing else: tables, pictures inside, and the commands
that give it again. Needs the `plot` extra.
"""

import base64
import datetime
import os
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from pathlib import Path

import torch
import transformers
from jinja2 import Environment, StrictUndefined

from .. import plot
from ..device import in_units
from ..folder.companions import version
from ..folder.provenance import commands
from ..folder.record import read_record
from ..folder.writer import RECORD, write_text


def write_page(result: dict, file: Path, command: str) -> None:
    """Write the page of what `compare` returned; command: the one that was typed."""
    rows, far, pictures = result["models"], result.get("long_context"), {}
    if len(rows) > 1:
        pictures["comparison"] = picture(plot.comparison, rows)
        if len(rows[0]["context"]) > 1:
            pictures["context"] = picture(plot.by_context, rows[1:])
        if far:
            pictures["far"] = picture(plot.by_context, far["models"][1:])
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(
        resources.files("lrkv_convert").joinpath("data/report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        result=result,
        rows=rows,
        far=far,
        retrieval=result.get("retrieval"),
        pictures=pictures,
        bytes=in_units,
        command=command,
        made=made(rows),
        tasks=task_table(result.get("tasks", [])),
        date=datetime.date.today().isoformat(),
        versions={
            "lrkv-convert": version("lrkv-convert"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    )
    write_text(file, page)


def picture(draw: Callable, *arguments) -> str:
    """What `draw(*arguments, file)` draws, as the address of an image inside the page."""
    stream = BytesIO()
    draw(*arguments, stream)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def made(rows: list[dict]) -> list[tuple[str, list[str]]]:
    """(name, commands) of every converted folder among the models."""
    found = []
    for path in dict.fromkeys(row["path"] for row in rows):
        if (Path(path) / RECORD).is_file():
            name = os.path.basename(os.path.abspath(path))
            found.append((name, commands(read_record(Path(path)), name)))
    return found


def task_table(tasks: list[dict]) -> dict:
    """{"models": names, "rows": [(task, metric, [(value, stderr), ...]), ...]}"""
    names, kinds = (
        list(dict.fromkeys(row["name"] for row in tasks)),
        dict.fromkeys((row["task"], row["metric"]) for row in tasks),
    )
    values = {
        (row["task"], row["metric"], row["name"]): (row["value"], row["stderr"]) for row in tasks
    }
    return {
        "models": names,
        "rows": [(*kind, [values[(*kind, name)] for name in names]) for kind in kinds],
    }
