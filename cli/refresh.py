"""`lrkv refresh`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, quiet_libraries


@app.command()
def refresh(
    folder: Annotated[Path, typer.Argument(help="Converted or healed folder.")],
) -> None:
    """Bring the modelling files of a converted folder up to date, for a newer transformers; its
    weights stay.
    """
    quiet_libraries()
    from lrkv_convert.folder.travelling import refresh as run

    changed = run(folder)
    print(
        f"{folder}: {', '.join(sorted(changed))} brought up to date"
        if changed
        else f"{folder} is up to date"
    )
