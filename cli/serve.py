"""`lrkv serve`: transformers' own server, which looks model classes up in the transformers module
and so finds none that travel with a folder.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import Command, app, visible


@app.command(
    cls=Command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Converted folder.")],
) -> None:
    """`transformers serve MODEL` (OpenAI-compatible): takes the same options, for example --port
    8000 --device cpu.
    """
    from lrkv_convert import LrkvError
    from lrkv_convert.evaluate.load import load_tokenizer, location, read_config, refuse_encoder
    from lrkv_convert.modeling import name_in_transformers

    refuse_encoder(model, read_config(model))
    where, _ = location(model)
    if Path(where).is_dir() and load_tokenizer(model).chat_template is None:
        print(
            visible(
                f"{model} has no chat template: /v1/chat/completions will fail, use /v1/completions"
            ),
            file=sys.stderr,
        )
    name_in_transformers()
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
        from transformers.cli.transformers import app as transformers_cli
    except ImportError as error:
        raise LrkvError(
            f"the server needs {error.name}", "pip install 'transformers[serving]'"
        ) from error
    transformers_cli(args=["serve", model, *ctx.args], prog_name="transformers")
