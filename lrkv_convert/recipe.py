"""Recipes: YAML files of options, by name (shipped, `recipes/<kind>/<name>.yaml`) or by path."""
import difflib
from importlib import resources
from pathlib import Path

import yaml

from .errors import LrkvError

KINDS = ("convert", "heal", "accelerate")       # the last are accelerate's own configuration files


def shipped(kind: str) -> dict[str, str]:
    """Names and texts of the shipped recipes of a kind ("convert", "heal")."""
    folder = resources.files("lrkv_convert.recipes").joinpath(kind)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
            for file in sorted(folder.iterdir(), key=lambda f: f.name) if file.name.endswith(".yaml")}


def load_recipe(name: str, kind: str, allowed: set[str]) -> dict:
    """Options of a recipe. Raises LrkvError for an unknown name, broken YAML or a field outside `allowed`."""
    path = Path(name)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif name in (known := shipped(kind)):
        text = known[name]
    else:
        raise LrkvError(f"no recipe {name!r}", f"shipped: {', '.join(known)}; or give the path of a YAML file")
    try:
        options = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise LrkvError(f"recipe {name} is not YAML: {str(error).splitlines()[0]}", "see the shipped recipes for the form") from error
    if not isinstance(options, dict):
        raise LrkvError(f"recipe {name} holds no fields", "see the shipped recipes for the form")
    if unknown := sorted(map(str, set(options) - allowed)):
        meant = [f"{field} (did you mean {near[0]}?)" if (near := difflib.get_close_matches(field, allowed, n=1)) else field for field in unknown]
        raise LrkvError(f"recipe {name} has unknown fields: {', '.join(meant)}",
                        f"known: {', '.join(sorted(allowed))}")
    return options


def find(name: str) -> str:
    """Text of a shipped recipe, by NAME or KIND/NAME. Raises LrkvError for unknown names, and for one that several kinds have."""
    every = {f"{kind}/{recipe}": text for kind in KINDS for recipe, text in shipped(kind).items()}
    found = [full for full in every if name in (full, full.split("/")[1])]
    if len(found) != 1:
        near = found or difflib.get_close_matches(name, [*every, *(full.split("/")[1] for full in every)], n=1) or sorted(every)
        raise LrkvError(f"{'several recipes are called' if found else 'no recipe'} {name!r}", f"{'give one of' if found else 'did you mean'} {', '.join(near)}")
    return every[found[0]]


def read_fields(settings: list[str], allowed: set[str]) -> dict:
    """Fields given as "name=value", values as in YAML. Raises LrkvError for other forms and unknown names."""
    fields = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise LrkvError(f"{setting!r} sets nothing", "write name=value")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            raise LrkvError(f"there is no field {name!r}", f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(allowed))}")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise LrkvError(f"the value of {setting!r} is not YAML", "write a number, a word, true, false or a list") from error
    return fields
