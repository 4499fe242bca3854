"""Recipes: YAML files of options, by name (shipped, `recipes/<kind>/<name>.yaml`) or by path."""
from importlib import resources
from pathlib import Path

import yaml

from .errors import LrkvError


def shipped(kind: str) -> dict[str, str]:
    """Names and texts of the shipped recipes of a kind ("convert")."""
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
    if not isinstance(options, dict) or (unknown := sorted(set(options) - allowed)):
        raise LrkvError(f"recipe {name} has unknown fields: {', '.join(unknown) if isinstance(options, dict) else 'it is no mapping'}",
                        f"known: {', '.join(sorted(allowed))}")
    return options
