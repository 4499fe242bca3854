"""The fields of options, read one way wherever they come from: a recipe, --set, a flag or a keyword
argument. Their types are the annotations of the dataclass; `option` says the rest of them, from
which the command line (cli/flags.py), the checks and the tables of docs/ (cli/docs.py) are made.

    @dataclass(frozen=True)
    class Options(Typed):
        keep: int = option(2, "Checkpoints kept.", limits=[at_least(1)], advanced=True)
"""

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args

from ..errors import LrkvError

# of whole numbers: nothing here is counted as far; beyond 2^63 tensors raise errors of their own
LARGEST = 10**15
EXPECTED = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    bool: "true or false",
    list[str]: "a list of files",
    NoneType: "left out",
}


@dataclass(frozen=True)
class Limit:
    """What a number must be. says: that in words, as the hint of a refusal; found: what is wrong,
    made of {name} and {value}.
    """

    holds: Callable[[float], bool]
    says: str
    found: str = "{name} is {value}"


def at_least(low: int) -> Limit:
    return Limit(lambda value: low <= value < math.inf, f"it must be at least {low}")


def at_most(high: int) -> Limit:
    return Limit(lambda value: value <= high, f"it must be at most {high:,}")


def between(low: float, high: float) -> Limit:
    return Limit(lambda value: low <= value <= high, f"it must lie between {low} and {high}")


POSITIVE = Limit(lambda value: 0 < value < math.inf, "it must be positive")


@dataclass(frozen=True)
class Said:
    """What is said of a field beside its type and its default.

    help: in a sentence or two, without the default unless that is None; choices: the words it may
    be; limits: of a number; flag: how it is spelt on the command line where its name does not say
    so; advanced: not a flag of its own, a recipe or --set says it; given: whether users give it.
    """

    help: str
    choices: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    called: str | None = None
    flag: str | None = None
    advanced: bool = False
    given: bool = True

    def check(self, name: str, value) -> None:
        """Raise LrkvError for a value that is none of the choices, or beyond a limit."""
        if self.choices and value not in self.choices:
            raise LrkvError(
                f"unknown {self.called or name} {value!r}", f"choose from {', '.join(self.choices)}"
            )
        for limit in self.limits:
            if not limit.holds(value):
                raise LrkvError(limit.found.format(name=name, value=value), limit.says)


def option(
    default, help: str, *, choices: Sequence[str] = (), limits: Sequence[Limit] = (), **said
):
    """A field of options: its default, and what `Said` keeps of it."""
    about = Said(help, tuple(choices), tuple(limits), **said)
    return field(default=default, metadata={"said": about})


def said(of: Field) -> Said:
    """What `option` said of a field."""
    return of.metadata["said"]


def kinds(of: Field) -> tuple[Any, ...]:
    """The types a field may have, as its annotation says them."""
    return get_args(of.type) if isinstance(of.type, UnionType) else (of.type,)


@dataclass(frozen=True)
class Typed:
    """A frozen dataclass whose fields are what their annotations say, or LrkvError. One word is a
    list of words. Every field is an `option`.
    """

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            object.__setattr__(self, each.name, fitted(each.name, value, kinds(each)))

    def check_fields(self) -> None:
        """Raise LrkvError for a field out of its choices or its limits, each by itself."""
        for each in fields(self):
            if (value := getattr(self, each.name)) is not None:
                said(each).check(each.name, value)

    @classmethod
    def given(cls) -> dict[str, Field]:
        """The fields that users may set, by name."""
        return {each.name: each for each in fields(cls) if said(each).given}


def fitted(name: str, value, kinds: tuple):
    """`value` as one of the kinds. Raises LrkvError that names the field, the value and what is
    expected."""
    for kind in kinds:
        if fits(value, kind):
            return {float: float, list[str]: list}.get(kind, lambda same: same)(value)
    if list[str] in kinds and fits(value, str) and value:
        return [value]
    if int in kinds and isinstance(value, float) and value.is_integer() and fits(int(value), int):
        return int(value)  # 1e6 tokens
    expected = " or ".join(EXPECTED[kind] for kind in kinds if kind is not NoneType)
    raise LrkvError(f"{name} is {shown(value)}", f"it must be {expected}")


def fits(value, kind) -> bool:
    """Whether a value is of this kind. True and false are no numbers, nor is NaN."""
    if kind is float:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and not math.isnan(value)
            and (isinstance(value, float) or abs(value) < LARGEST)
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    if kind == list[str]:
        return isinstance(value, list | tuple) and all(
            isinstance(word, str) and word for word in value
        )
    return value is None if kind is NoneType else isinstance(value, kind)


def shown(value) -> str:
    """A value in a refusal, however large it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= LARGEST:
        return "too large a number"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
