"""`lrkv bench`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import LARGEST, Command, app, quiet_libraries


@app.command(cls=Command)
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help=(
                "The original first, then converted folders: what the others are compared with"
                " comes first."
            )
        ),
    ],
    tokens: Annotated[
        str,
        typer.Option(
            help=(
                "Cached tokens per row, separated by commas; of an encoder-decoder, of its decoder."
            )
        ),
    ] = "1024,4096",
    batch: Annotated[str, typer.Option(help="Rows decoded at once, separated by commas.")] = "1",
    paths: Annotated[
        str,
        typer.Option(
            help="How converted models attend, separated by commas: auto, rebuild, split, kernel."
        ),
    ] = "auto,rebuild",
    cache: Annotated[
        str,
        typer.Option(
            help=(
                "static (allocated once) or dynamic (copied at every step, the default of"
                " generate)."
            )
        ),
    ] = "static",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; the median counts.")] = 9,
    longest: Annotated[
        bool, typer.Option("--longest", help="Also find the longest context that fits (on a GPU).")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--png", help="Also draw it (needs matplotlib).")
    ] = None,
) -> None:
    """Decode with models side by side: time per token, tokens per second, memory, distance to the
    limit of the machine.
    """
    quiet_libraries()
    from lrkv_convert import LrkvError
    from lrkv_convert.device import pick_device, pick_dtype
    from lrkv_convert.evaluate import bench as run
    from lrkv_convert.evaluate.bench import CACHES
    from lrkv_convert.folder.places import check_file, writing
    from lrkv_convert.folder.writer import write_json
    from lrkv_convert.modeling.attention_lrkv import PATHS

    from . import display

    routes = list(dict.fromkeys(paths.split(",")))
    for name, given, known in (("--paths", routes, PATHS), ("--cache", [cache], CACHES)):
        if unknown := [g for g in given if g not in known]:
            raise LrkvError(f"{name} {unknown[0]!r} is unknown", f"choose from {', '.join(known)}")
    json_file, picture = (
        file and check_file(file, option)
        for file, option in ((json_file, "--json"), (picture, "--png"))
    )
    if picture:
        try:
            from lrkv_convert.plot import check_format, decoding
        except ImportError as error:
            raise LrkvError("--png needs matplotlib", "pip install matplotlib") from error
        check_format(picture)
    with display.progress() as progress:
        result = run(
            models,
            tokens=_numbers("--tokens", tokens),
            batches=_numbers("--batch", batch),
            routes=routes,
            cache=cache,
            steps=steps,
            longest=longest,
            device=pick_device(device),
            dtype=pick_dtype(dtype),
            progress=lambda done, total: progress("decoding", done, total),
        )
    display.show_bench(result)  # first of all: what comes now may fail
    if json_file:
        with writing(json_file):
            write_json(json_file, result)
    if picture:
        with writing(picture):
            decoding(result, picture)


def _numbers(name: str, text: str) -> list[int]:
    from lrkv_convert import LrkvError

    try:
        found = list(dict.fromkeys(int(n) for n in text.split(",")))
    except ValueError as error:
        raise LrkvError(
            f"{name} {text!r} are not numbers", "separate them by commas, as in 2048,8192"
        ) from error
    if min(found) < 1 or max(found) > LARGEST:
        raise LrkvError(
            f"{name} {text!r}: {min(found) if min(found) < 1 else 'a number'} is too"
            f" {'small' if min(found) < 1 else 'large'}",
            "give numbers above zero that a memory can hold",
        )
    return found
