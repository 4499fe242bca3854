"""What all commands share: the app, one line for an error, clean exit codes, several values for one option."""
import os
import signal
import sys

import typer
from typer.core import TyperCommand, TyperGroup


class Refusals(TyperGroup):
    """Turns a refusal into one line on stderr and exit code 1, Ctrl-C into 130."""

    def invoke(self, ctx: typer.Context):
        signal.signal(signal.SIGTERM, signal.default_int_handler)      # a polite kill cleans up as Ctrl-C does
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print(stop if stop.args and isinstance(stop.args[0], str) else "interrupted; nothing was left behind", file=sys.stderr)
            ctx.exit(130)
        except Exception as error:
            if type(error).__name__ == "LrkvError":     # by name: importing the class would import torch
                from .display import show_error
                if speaks_for_all():
                    show_error(error)
                ctx.exit(1)
            raise


class Variadic(TyperCommand):
    """Lets an option that may be repeated take several values at once: `--calibration a.txt b.txt`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread, current = [], None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in several else None
                spread.append(arg)
            elif current and spread[-1] != current:
                spread += [current, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)


app = typer.Typer(cls=Refusals, no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Convert pretrained attention to LRKV: a smaller key-value cache, and what it cost.")


def speaks_for_all() -> bool:
    """Whether this is the only process on its machine, or the first of those that accelerate, torchrun or MPI started there."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"))


def quiet_libraries() -> None:
    """transformers' own progress bars and warnings would tear ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")          # the GGUF reader's bar does not ask transformers
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
