"""The tables of options in docs/, written from the commands: `python -m lrkv_cli.docs docs`.

A page holds `<!-- options of lrkv COMMAND: ... -->` and `<!-- end of options -->`; what stands
between them is replaced.
"""

import re
import sys
from dataclasses import Field
from pathlib import Path

from typer.main import get_command

from lrkv_convert.settings.fields import said
from lrkv_convert.train.options import Options

from .flags import default_of
from .main import app

PLACE = re.compile(
    r"(?P<open><!-- options of lrkv (?P<command>\w+):[^\n]*-->\n)"
    r".*?"
    r"(?P<close><!-- end of options -->)",
    re.DOTALL,
)
# command -> the options whose fields a recipe or --set may give beside its flags
FIELDS = {"heal": Options}


def commands() -> dict:
    """The commands by name, as click knows them."""
    return get_command(app).commands  # type: ignore[attr-defined]


def written(page: str) -> str:
    """The text of a page with its tables as they are now."""
    return PLACE.sub(
        lambda found: f"{found['open']}\n{tables(found['command'])}\n{found['close']}", page
    )


def tables(command: str) -> str:
    """The table of a command's arguments and options and, where it has recipes, of their fields."""
    rows = [
        (f"`{spelling(parameter)}`", meaning(parameter))
        for parameter in commands()[command].params
        if parameter.name != "help"
    ]
    text = table(("option", "what it is"), rows)
    if command in FIELDS:
        fields = [
            (f"`{name}`", default_of(field), said(field).help, limits(field))
            for name, field in FIELDS[command].given().items()
        ]
        text += (
            "\nThe fields of its recipes, each also `--set name=value`. The defaults are the recipe"
        )
        text += "\n`short`.\n\n" + table(("field", "default", "what it is", "limits"), fields)
    return text


def spelling(parameter) -> str:
    """An option as it is typed, an argument as a word in capitals."""
    if parameter.param_type_name == "argument":
        return parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return ", ".join(parameter.opts) + "".join(f" / {off}" for off in parameter.secondary_opts)


def meaning(parameter) -> str:
    """The help of an option, its default and whether it must be given."""
    if parameter.param_type_name == "argument":
        return parameter.help
    default = parameter.default
    if isinstance(default, bool):
        default = parameter.opts[0] if default else None
    if parameter.required:
        return f"{parameter.help} Required."
    return f"{parameter.help} Default: {default}." if default is not None else parameter.help


def limits(field: Field) -> str:
    """The limits of a field: "at least 1"."""
    return " and ".join(re.sub("^it must (be |lie )?", "", x.says) for x in said(field).limits)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    line = lambda row: "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n"
    return line(head) + "|---" * len(head) + "|\n" + "".join(map(line, rows))


def main(folder: Path) -> None:
    """Write the tables into the pages of a folder, and print which have changed."""
    for file in sorted(folder.glob("*.md")):
        page = file.read_text(encoding="utf-8")
        if (now := written(page)) != page:
            file.write_text(now, encoding="utf-8")
            print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
