"""`lrkv sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries
from .measured import Audio, Calibration, Pairs


@app.command(cls=Command)
def sweep(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.csv and sweep.png.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text file to measure on; not one of --calibration."),
    ] = None,
    pairs: Pairs = None,
    audio: Audio = None,
    ranks: Annotated[
        str,
        typer.Option(
            help="Residual ranks, separated by commas; methods without a rank match their bytes."
        ),
    ] = "4,8,16,24,32",
    methods: Annotated[
        str | None,
        typer.Option(
            help=(
                "codes, budget, lrkv, latent, per-head, grouped, pooled, mean, separated by commas;"
                " a metric may follow a colon: fisher, attention, whitened, plain."
            )
        ),
    ] = None,
    bits: Annotated[
        str,
        typer.Option(
            help="Bits of the method codes: auto, or a list such as 8,4,2 to choose from."
        ),
    ] = "auto",
    calibration: Calibration = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=512, help="Tokens of calibration. Default: as convert.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Correct W_O in closed form after each fit.")
    ] = True,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Window of text in tokens. Default: 512.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Read no more to measure on than this.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Convert at several sizes by several methods and draw the frontier of quality against
    cache.
    """
    quiet_libraries()
    from lrkv_convert import LrkvError
    from lrkv_convert.device import pick_device
    from lrkv_convert.examples.text import read_one
    from lrkv_convert.folder.places import check_folder, expanded
    from lrkv_convert.frontier import save
    from lrkv_convert.frontier import sweep as run

    from . import display

    try:
        sizes = [int(r) for r in ranks.split(",")]
    except ValueError as error:
        raise LrkvError(
            f"ranks {ranks!r} are not numbers", "separate them by commas, as in 8,16,32"
        ) from error
    check_folder(out := expanded(out))
    content = None if text is None else read_one(text)
    with display.progress() as progress:
        result = run(
            model,
            sizes,
            content,
            pairs=pairs,
            audio=audio,
            methods=methods.split(",") if methods else None,
            bits=bits,
            calibration=[] if calibration == ["none"] else calibration,
            calibration_tokens=calibration_tokens,
            refit=refit,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=pick_device(device),
            progress=progress,
            each=lambda result: save(result, out),
        )
    display.show_notices(result["notices"])
    display.show_sweep(result, save(result, out))
