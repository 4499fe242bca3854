"""The flags of a command, made of the fields of its options: their types, spellings and help.

    @app.command(cls=Command)
    @flags_of(Options)
    def convert(model: ..., out: ..., given: dict, ...):

`given` becomes the flags and, in the call, the fields that were given: a flag left out is None, so
that a recipe may say it.
"""

import inspect
from collections.abc import Callable
from dataclasses import Field
from functools import wraps
from types import NoneType
from typing import Annotated, Any, get_type_hints

import typer

from lrkv_convert.settings.fields import Typed, kinds, said

GIVEN = "given"  # the parameter that stands for the flags
KEYWORD = inspect.Parameter.KEYWORD_ONLY  # typer calls by name


def flags_of(options: type[Typed]) -> Callable[[Callable], Callable]:
    """A decorator that gives a command a flag for every field that is not advanced."""
    flags = {
        name: flag(field) for name, field in options.given().items() if not said(field).advanced
    }

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def called(**values):
            given = {name: values.pop(name) for name in flags}
            fields = {name: value for name, value in given.items() if value is not None}
            return command(**values, **{GIVEN: fields})

        hints = get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        parameters = []
        for name, parameter in signature.parameters.items():
            own = parameter.replace(annotation=hints[name], kind=KEYWORD)
            parameters += flags.values() if name == GIVEN else [own]
        vars(called)["__signature__"] = signature.replace(parameters=parameters)
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def flag(field: Field) -> inspect.Parameter:
    """The parameter of a field, as typer reads it: None where it is not given."""
    spelt = said(field).flag
    spellings = [spelt] if spelt else []
    return inspect.Parameter(
        field.name,
        KEYWORD,
        default=None,
        annotation=Annotated[typed(field) | None, typer.Option(*spellings, help=help_of(field))],
    )


def typed(field: Field) -> Any:
    """The type of what is typed: one of a field's, a word where that is one of several."""
    several = [kind for kind in kinds(field) if kind is not NoneType]
    return several[0] if len(several) == 1 else str


def help_of(field: Field) -> str:
    """The help of a field and its default; where that is None the help says what it stands for."""
    default = default_of(field)
    return f"{said(field).help} Default: {default}." if default else said(field).help


def default_of(field: Field) -> str:
    """The default in words, as it is typed: "" for None and for a switch that is off."""
    default, spelt = field.default, said(field).flag
    if isinstance(default, bool):
        on, _, off = (spelt or "true/false").partition("/")
        return on if default else off
    return "" if default is None else str(default)
