"""Options of commands that measure on one thing: a text, or what an encoder-decoder reads."""

from typing import Annotated

import typer

Pairs = Annotated[
    str | None,
    typer.Option(
        help=(
            "In its place, of an encoder-decoder that reads text: a .jsonl file of"
            ' {"source": ..., "target": ...}, or texts.'
        )
    ),
]
Audio = Annotated[
    str | None,
    typer.Option(
        help=(
            "In its place, of a speech model: a folder of .wav files (x.txt beside x.wav, or"
            " transcripts.tsv)."
        )
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help=(
            "Text files or folders, several. Default: the text that ships here. Of an"
            " encoder-decoder what lrkv convert takes."
        )
    ),
]
