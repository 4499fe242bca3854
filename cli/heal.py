"""`lrkv heal`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lrkv_convert.train.options import Options

from .app import Command, app, quiet_libraries, speaks_for_all
from .flags import flags_of


@app.command(cls=Command)
@flags_of(Options)
def heal(
    model: Annotated[str, typer.Argument(help="Folder of a converted model.")],
    data: Annotated[
        list[str],
        typer.Option(
            help=(
                "Text, jsonl or parquet files, folders of them, several; or datasets as"
                " org/name:config:split. Of an encoder-decoder folders of .wav, .jsonl pairs or"
                " texts, as --calibration of convert."
            )
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    given: dict,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=(
                "Options from a shipped recipe (lrkv recipes) or a YAML file; flags override it."
                " Default: short."
            )
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original: folder, .gguf file or hub id. Default: the one lrkv.json names."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=(
                "Any field of a recipe, as name=value, several: text_field=content,"
                " validation=FILE, ... `lrkv recipes short` explains all."
            ),
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a run that stopped.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier healed folder, or a run that stopped."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the history entry as JSON instead of a table.")
    ] = False,
) -> None:
    """Train a converted model for a while, so that it gets back what the conversion cost."""
    quiet_libraries()
    from lrkv_convert.healing import heal as run
    from lrkv_convert.settings.recipe import load_recipe, read_fields

    from . import display

    known, recipe = set(Options.given()), recipe or "short"
    options = load_recipe(recipe, "heal", known) | read_fields(set_ or [], known) | given
    with display.healing(shown=speaks_for_all()) as (report, stage, notice):
        done = run(
            model,
            out,
            data,
            teacher=teacher,
            device=device,
            overwrite=overwrite,
            resume=resume,
            recipe=recipe,
            max_shard_size=max_shard_size,
            report=report,
            stage=stage,
            notice=notice,
            **options,
        )
    if done.main and as_json:
        print(json.dumps(done.entry.to_json(), indent=2))
    elif done.main:
        display.show_healing(done.entry, model, done.out, done.family)
