"""JSON objects as frozen dataclasses, whose annotations say what belongs where:

    rank: Annotated[int, "rank r of the residual of each head"]

Reading checks every value against them, writing gives the same object again, and a page of
documentation is made of them. Needs the standard library alone.
"""

import json
import textwrap
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from .errors import LrkvError, first_line

ABSENT = object()  # marks fields that are left out where they say nothing
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


class Unlike(ValueError):
    """What is not as it is written: where it stands, and what it is."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A JSON object. more: fields of it that this version does not know."""

    more: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, content: Any, name: str = "the record") -> Self:
        """Raises LrkvError for what is no such object; name: what the refusal calls it."""
        try:
            found = _decoded(cls, cls.upgraded(content), "")
            found.check()
            return found
        except Unlike as error:
            raise LrkvError(
                f"{name} is not as lrkv convert wrote it: {error}", "convert the model again"
            ) from error

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """The object as it is written today."""
        return content

    def check(self) -> None:
        """Raises Unlike for values that do not go together."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, texts and numbers."""
        said = {}
        for each in known(type(self)):
            value = getattr(self, each.name)
            if not (ABSENT in get_args(each.type) and value == each.default):
                said[each.name] = _encoded(value)
        return said | self.more


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    return WORDS.get(type(value), "something else")


def known(cls: type[Part]) -> list:
    """The fields of a class that are said, in the order in which they are written."""
    return [each for each in fields(cls) if each.name != "more"]


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises LrkvError for anything else in it, OSError where there is
    no file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LrkvError(
            f"{file} is not JSON: {first_line(error)}", "download it again, or mend it"
        ) from error
    if not isinstance(found, dict):
        raise LrkvError(
            f"{file} holds {kind_of(found)} where an object {{...}} belongs",
            "download it again, or mend it",
        )
    return found


def as_object(content: Any, at: str) -> dict[str, Any]:
    """Raises Unlike for anything but an object; at: where it stands."""
    if not isinstance(content, dict):
        raise Unlike(f"{at} holds {kind_of(content)} where an object belongs")
    return content


def _decoded(kind: Any, value: Any, at: str) -> Any:
    """A value of JSON as an annotation has it. Raises Unlike."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _decoded(inside[0], value, at)
    if origin in (Union, UnionType):
        return _decoded(_fitting(inside, value), value, at)
    if kind is Any:
        return value
    if isinstance(kind, type) and issubclass(kind, Part):
        return _part(kind, as_object(value, at or "it"), at)
    wanted = origin or kind
    taken = {float: (int, float), tuple: (list, tuple)}.get(wanted, (wanted,))
    if not isinstance(value, taken) or isinstance(value, bool) and wanted is not bool:
        raise Unlike(f"{at} holds {kind_of(value)} where {WORDS[wanted]} belongs")
    if isinstance(value, list | tuple):
        return tuple(_decoded(inside[0], each, f"{at}[{i}]") for i, each in enumerate(value))
    if isinstance(value, dict):
        return {name: _decoded(inside[1], each, f"{at}.{name}") for name, each in value.items()}
    return value


def _fitting(kinds: tuple, value: Any) -> Any:
    """That of several annotations which a value is read as."""
    if value is None and type(None) in kinds:
        return type(None)
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    if isinstance(value, list) and lists:
        return lists[0]
    return next(kind for kind in kinds if kind is not type(None))


def _part(cls: type[Part], content: dict[str, Any], at: str) -> Any:
    found: dict[str, Any] = {}
    for each in known(cls):
        where = f"{at}.{each.name}".lstrip(".")
        if each.name in content:
            found[each.name] = _decoded(each.type, content[each.name], where)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise Unlike(f"{where} is not there")
    names = {each.name for each in known(cls)}
    return cls(**found, more={name: content[name] for name in content if name not in names})


def _encoded(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_json()
    if isinstance(value, dict):
        return {name: _encoded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(each) for each in value]
    return value


def tables(cls: type[Part]) -> str:
    """Every class that a file holds, outermost first, as Markdown."""
    found, waiting = [], [cls]
    while waiting:
        each = waiting.pop(0)
        if each in found:
            continue
        found.append(each)
        waiting += [part for one in known(each) for part in _parts(one.type)]
    return "\n\n".join(_table(each) for each in found)


def _parts(kind: Any) -> list[type[Part]]:
    """The classes that an annotation speaks of."""
    if isinstance(kind, type) and issubclass(kind, Part):
        return [kind]
    return [part for inside in get_args(kind) for part in _parts(inside)]


def _table(cls: type[Part]) -> str:
    rows = [
        f"| `{each.name}` | {_named(get_args(each.type)[0])} | {get_args(each.type)[1]} |"
        for each in known(cls)
    ]
    text = textwrap.fill(f"**{cls.__name__}**: {' '.join((cls.__doc__ or '').split())}", 100)
    head = [text, "", "| field | type | meaning |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def _named(kind: Any, many: bool = False) -> str:
    """An annotation in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_named(each) for each in inside)
    if isinstance(kind, type) and issubclass(kind, Part):
        return kind.__name__
    if kind is Any:
        return "anything"
    name = WORDS[origin or kind].removeprefix("an ").removeprefix("a ") + "s" * many
    return f"{name} of {_named(inside[-1 if origin is dict else 0], many=True)}" if inside else name
