"""`lrkv recipes`."""

from typing import Annotated

import typer

from .app import Command, app


@app.command(cls=Command)
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this one, as NAME or KIND/NAME.")
    ] = None,
) -> None:
    """List the recipes that ship here, or print one."""
    from lrkv_convert.settings.recipe import KINDS, find, shipped

    from . import display

    if name:
        print(find(name), end="")
    else:
        display.show_recipes({kind: shipped(kind) for kind in KINDS})
