"""`lrkv inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries
from .measured import Audio, Calibration, Pairs


@app.command(cls=Command)
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help=(
                "Folder, .gguf file or hub id of an original: what to expect. Or a converted"
                " folder: what was done to each head."
            )
        ),
    ],
    original: Annotated[
        str | None,
        typer.Option(
            help=(
                "What a converted folder is compared with. Default: where its lrkv.json says it"
                " came from."
            )
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None,
        typer.Option(help="Ranks to look at, several. Default: up to eight, below break-even."),
    ] = None,
    target_kl: Annotated[
        float,
        typer.Option(min=0, help="Divergence, in nats per token, that the recommendation allows."),
    ] = 0.05,
    calibration: Calibration = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of calibration. Default: 8192, of what is said 2048."),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help=(
                "Also remove heads, alone and several at once, and measure the loss on --text,"
                " --pairs or --audio."
            ),
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help=(
                "Text file to measure on. Default for a converted folder: the text that ships here."
            )
        ),
    ] = None,
    pairs: Pairs = None,
    audio: Audio = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Read no more of it. Default: 4096, with --ablate 1024."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Also write inspect.json, heads.png and, with --ablate, ablation.png to this"
                " folder."
            )
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Look at every head: what a conversion would cost and which rank to take, or what a conversion
    has done.
    """
    quiet_libraries()
    from lrkv_convert import LrkvError
    from lrkv_convert.folder.places import check_folder, expanded
    from lrkv_convert.inspection import inspect as run
    from lrkv_convert.inspection import save

    from . import display

    try:
        wanted = [int(r) for group in ranks for r in group.split(",")] if ranks else None
    except ValueError as error:
        raise LrkvError(
            f"ranks {' '.join(ranks or [])!r} are not numbers", "give some, as in --ranks 8 16 32"
        ) from error
    if out:
        check_folder(out := expanded(out))
    given = [] if calibration == ["none"] else calibration
    with display.progress() as progress:
        result = run(
            model,
            original=original,
            ranks=wanted,
            target_kl=target_kl,
            calibration=given,
            calibration_tokens=calibration_tokens,
            ablate=ablate,
            text=text,
            pairs=pairs,
            audio=audio,
            max_tokens=max_tokens,
            device=device,
            progress=progress,
        )
    display.show_notices(result["notices"])
    if result["kind"] == "original":
        display.show_expectation(result, given)
    else:
        display.show_fidelity(result)
    if out:
        display.show_files(save(result, out))
