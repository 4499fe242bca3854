"""The fields of options, read one way wherever they come from: a recipe, --set, a flag or a keyword
argument. Their types are the annotations of the dataclass."""

import math
import reprlib
from dataclasses import fields
from types import NoneType, UnionType
from typing import get_args

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


class Typed:
    """A frozen dataclass whose fields are what their annotations say, or LrkvError. One word is a
    list of words."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
            object.__setattr__(self, field.name, fitted(field.name, value, kinds))


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
