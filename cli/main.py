"""`lrkv`: importing a command's module adds it to the app."""

from . import (  # noqa: F401
    bench,
    compare,
    convert,
    demo,
    heal,
    inspect,
    push,
    recipes,
    refresh,
    serve,
    sweep,
)
from .app import app

__all__ = ["app"]

if __name__ == "__main__":  # accelerate launch -m lrkv_cli.main heal ...
    app()
