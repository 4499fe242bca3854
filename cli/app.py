"""What all commands share: the app, one line for an error, clean exit codes, several values for one
option, values that no command can use."""

import errno
import math
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

LARGEST = 10**15  # nothing here is counted as far
if TYPE_CHECKING:
    from lrkv_convert.errors import LrkvError

    UsageError = typer.BadParameter  # a type checker wants a name
else:
    [UsageError] = typer.BadParameter.__bases__  # of the click that this typer brings, or uses


class Refusals(TyperGroup):
    """Turns a refusal into one line on stderr and exit code 1, wrong usage into one and 2, Ctrl-C
    into 130."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            refuse_usage(ctx, error)

    def invoke(self, ctx: typer.Context):
        # a polite kill cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # names may hold odd bytes
        try:
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found
        except KeyboardInterrupt as stop:
            said = stop.args and isinstance(stop.args[0], str)
            tell(str(stop) if said else "interrupted; nothing was left behind")
            ctx.exit(130)
        except UsageError as error:
            refuse_usage(ctx, error)
        except OSError as error:  # what nobody foresaw of disks and paths
            if error.errno == errno.EPIPE:  # nobody reads on: typer ends quietly
                raise
            if speaks_for_all():
                where = f": {error.filename}" if error.filename else ""
                found = error.strerror or type(error).__name__
                tell(f"error: {found}{where}; check paths, permissions and free space")
            drop_output()
            ctx.exit(1)
        except Exception as error:
            # by name: importing the class would import torch
            if type(error).__name__ == "LrkvError":
                if speaks_for_all():
                    refusal = cast("LrkvError", error)
                    hint = f"; {refusal.hint}" if refusal.hint else ""
                    tell(f"error: {refusal.message}{hint}")
                ctx.exit(1)
            if type(error).__name__ == "BrokenContract":
                tell(f"error: {error}")
                ctx.exit(1)
            raise


def refuse_usage(ctx: typer.Context, error: UsageError) -> NoReturn:
    """One line for arguments that make no sense, and exit code 2; without any, typer shows the
    help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error
    command = (error.ctx or ctx).command_path
    tell(f"error: {error.format_message().rstrip('.')}; {command} --help says more")
    ctx.exit(error.exit_code)


def tell(line: str) -> None:
    print(visible(line), file=sys.stderr)


def visible(text: str, kept: str = "") -> str:
    """A text for the terminal: control characters but those kept, which names of files may hold, as
    they are written in code."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def drop_output() -> None:
    """What could not be written is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Command(TyperCommand):
    """Lets an option that may be repeated take several values at once, `--calibration a.txt b.txt`,
    and refuses values that mean nothing anywhere."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread, current = [], None
        for arg in args:
            if not arg.strip() or arg.startswith("--") and arg.endswith("="):
                before = spread[-1] if spread and spread[-1].startswith("-") else "an argument"
                raise UsageError(f"{arg.rstrip('=').strip() or before} is empty", ctx=ctx)
            if arg.startswith("-"):
                current = arg if arg in several else None
                spread.append(arg)
            elif current and spread[-1] != current:
                spread += [current, arg]
            else:
                spread.append(arg)
        left = super().parse_args(ctx, spread)
        parameters: list[Any] = self.params  # typer asks for a narrower type where it reports one
        for parameter in parameters:
            given = ctx.params.get(parameter.name)
            for value in given if isinstance(given, list | tuple) else [given]:
                if reason := no_use(value):
                    raise typer.BadParameter(reason, ctx=ctx, param=parameter)
        return left


def no_use(value) -> str | None:
    """Why a value means nothing to any command."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no number to reckon with"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "the number is too large"
    return None


app = typer.Typer(
    cls=Refusals,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Convert pretrained attention to LRKV: a smaller key-value cache, and what it cost.",
)


def speaks_for_all() -> bool:
    """Whether this is the only process on its machine, or the first of those that accelerate,
    torchrun or MPI started there."""
    return all(
        os.environ.get(name, "0") == "0"
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    )


def quiet_libraries() -> None:
    """transformers' own progress bars and warnings would tear ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # the GGUF reader's bar does not ask transformers
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from lrkv_convert.modeling.contract_lrkv import newer

    if (note := newer()) and speaks_for_all():
        tell(f"note: {note}")
