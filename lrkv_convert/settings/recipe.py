"""Recipes: YAML files of options, by name (shipped, `recipes/<kind>/<name>.yaml`) or by path."""

import difflib
from importlib import resources
from pathlib import Path

from ..errors import LrkvError
from .plain_yaml import MOST, parse

KINDS = ("convert", "heal", "accelerate")  # the last are accelerate's own configuration files
SEE = "see the shipped recipes for the form"


def shipped(kind: str) -> dict[str, str]:
    """Names and texts of the shipped recipes of a kind ("convert", "heal")."""
    folder = resources.files("lrkv_convert.recipes").joinpath(kind)
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }


def load_recipe(name: str, kind: str, allowed: set[str]) -> dict:
    """Options of a recipe. Raises LrkvError for an unknown name, broken YAML or a field outside
    `allowed`.

    Of which type a value must be is told by the options it becomes (settings/fields.py).
    """
    known = shipped(kind)
    text = known[name] if name in known and not Path(name).is_file() else _read(name, known)
    options = parse(text, f"recipe {name}", SEE)
    if not isinstance(options, dict) or not options:
        raise LrkvError(
            f"recipe {name} holds no fields" if text.strip() else f"recipe {name} is empty", SEE
        )
    if unknown := sorted(str(field)[:40] for field in options if field not in allowed)[:5]:
        meant = [
            (
                f"{field} (did you mean {near[0]}?)"
                if (near := difflib.get_close_matches(field, allowed, n=1))
                else field
            )
            for field in unknown
        ]
        raise LrkvError(
            f"recipe {name} has unknown fields: {', '.join(meant)}",
            f"known: {', '.join(sorted(allowed))}",
        )
    return options


def _read(name: str, known: dict[str, str]) -> str:
    """The text of a recipe file. Raises LrkvError."""
    try:
        path = Path(name).expanduser()
        if path.is_file() and path.stat().st_size <= MOST:
            return path.read_text(encoding="utf-8")
        found = (
            "is a folder" if path.is_dir() else "is too large for one" if path.is_file() else None
        )
    except UnicodeDecodeError as error:
        raise LrkvError(f"recipe {name} is not UTF-8 text", "save it as UTF-8") from error
    # RuntimeError: the home of a user that is not there
    except (OSError, RuntimeError) as error:
        found = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise LrkvError(
        f"recipe {name} {found}" if found else f"no recipe {name!r}",
        f"shipped: {', '.join(known)}; or give the path of a YAML file",
    )


def find(name: str) -> str:
    """Text of a shipped recipe, by NAME or KIND/NAME. Raises LrkvError for unknown names, and for
    one that several kinds have.
    """
    every = {f"{kind}/{recipe}": text for kind in KINDS for recipe, text in shipped(kind).items()}
    found = [full for full in every if name in (full, full.split("/")[1])]
    if len(found) != 1:
        near = (
            found
            or difflib.get_close_matches(
                name, [*every, *(full.split("/")[1] for full in every)], n=1
            )
            or sorted(every)
        )
        raise LrkvError(
            f"{'several recipes are called' if found else 'no recipe'} {name!r}",
            f"{'give one of' if found else 'did you mean'} {', '.join(near)}",
        )
    return every[found[0]]


def read_fields(settings: list[str], allowed: set[str]) -> dict:
    """Fields given as "name=value", values as in YAML. Raises LrkvError for other forms and unknown
    names.
    """
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise LrkvError(f"{setting!r} sets nothing", "write name=value")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            raise LrkvError(
                f"there is no field {name!r}",
                f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(allowed))}",
            )
        fields[name] = parse(
            value, f"the value of {setting!r}", "write a number, a word, true, false or a list"
        )
    return fields
