"""`lrkv convert`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lrkv_convert.plan.options import Options

from .app import Command, app, quiet_libraries
from .flags import flags_of


@app.command(cls=Command)
@flags_of(Options)
def convert(
    model: Annotated[
        str, typer.Argument(help="Folder, .gguf file or hub id of the model to convert.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    given: dict,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    recipe: Annotated[
        str | None,
        typer.Option(help="Options from a shipped recipe or a YAML file; flags override it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier converted folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON instead of a table.")
    ] = False,
) -> None:
    """Convert a pretrained model to LRKV attention and write a folder that transformers loads."""
    quiet_libraries()
    from lrkv_convert import convert as run
    from lrkv_convert.settings.recipe import load_recipe

    from . import display

    options = load_recipe(recipe, "convert", set(Options.given())) if recipe else {}
    with display.progress() as progress:
        done = run(
            model,
            out,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            recipe=recipe,
            progress=progress,
            **options | given,
        )
    display.show_notices(done.notices)
    if as_json:
        planned = {
            kind: plan.as_dict()
            | {"forms": {name: each.cost() for name, each in done.forms.get(kind, {}).items()}}
            for kind, plan in done.plans.items()
        }
        print(json.dumps(done.record.to_json() if done.record else planned, indent=2))
    elif done.record is None:
        display.show_plan(done.plans, done.forms, model)
    else:
        display.show_conversion(done.record, model, out)
