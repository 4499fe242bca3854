"""`lrkv push`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries


@app.command(cls=Command)
def push(
    folder: Annotated[Path, typer.Argument(help="Converted or healed folder.")],
    repository: Annotated[
        str, typer.Argument(help="Where to: org/name on the hub; made if it is not there.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    branch: Annotated[
        str | None, typer.Option(help="Upload to this branch instead of main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a converted folder, its model card in front, to the Hugging Face hub (log in with `hf
    auth login`).
    """
    quiet_libraries()
    from lrkv_convert.folder.hub import push as run

    from . import display

    display.say(run(folder, repository, private=private, branch=branch, message=message))
