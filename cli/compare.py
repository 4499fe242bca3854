"""`lrkv compare` and `lrkv eval`."""
from pathlib import Path
from typing import Annotated

import typer

from .app import app, quiet_libraries

TextFile = Annotated[str, typer.Option("--text", help="Text file to measure on.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Window in tokens; windows do not overlap.")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Read no more of the text than this.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per forward pass.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16 or float64.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The original model: folder, .gguf file or hub id.")],
    others: Annotated[list[str], typer.Argument(help="Models to compare with it.")],
    text: TextFile, seq_len: SeqLen = 512, max_tokens: MaxTokens = None, batch_size: BatchSize = 1, device: Device = "auto", dtype: DType = "auto",
    json_file: Json = None,
) -> None:
    """Perplexity, KL, agreement and cache of models beside their original."""
    measure([base, *others], text, seq_len, max_tokens, batch_size, device, dtype, json_file)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id.")],
    text: TextFile, seq_len: SeqLen = 512, max_tokens: MaxTokens = None, batch_size: BatchSize = 1, device: Device = "auto", dtype: DType = "auto",
    json_file: Json = None,
) -> None:
    """Perplexity and cache of one model."""
    measure([model], text, seq_len, max_tokens, batch_size, device, dtype, json_file)


def measure(models: list[str], text: str, seq_len: int, max_tokens: int | None, batch_size: int, device: str, dtype: str, json_file: Path | None) -> None:
    quiet_libraries()
    from lrkv_convert import LrkvError
    from lrkv_convert.calibrate import read_texts
    from lrkv_convert.device import pick_device, pick_dtype
    from lrkv_convert.evaluate import compare as run
    from lrkv_convert.writer import write_json

    from . import display
    [content] = read_texts([text])
    if json_file and not json_file.parent.is_dir():
        raise LrkvError(f"cannot write {json_file}: its folder does not exist", "make it first")
    with display.progress() as progress:
        result = run(models, content, seq_len=seq_len, max_tokens=max_tokens, batch_size=batch_size, device=pick_device(device),
                     dtype=pick_dtype(dtype), progress=lambda done, total: progress("measuring", done, total))
    if json_file:
        write_json(json_file, result)
    display.show_comparison(result)
