"""Where a converted folder came from, read back from its lrkv.json: the source, the commands, and
what of it may be shown to others.
"""

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path

import yaml

from ..errors import LrkvError
from ..format import Healed, Record
from ..plan.options import Options
from ..schema import read_object
from ..settings.plain_yaml import parse
from ..settings.recipe import shipped
from .markup import quoted
from .writer import RECORD

LEFT_OUT = ("recipe", "max_shard_size")  # not in the record: what they decide is


def public_name(source: str) -> str:
    """What a source is called: a hub id as it is, of a path that exists the last part, as the rest
    says nothing to others.
    """
    path = Path(source).expanduser()
    return os.path.basename(os.path.abspath(path)) if path.exists() else source


def published(record: Record) -> Record:
    """lrkv.json without the paths of the machine it was made on."""
    return replace(
        record,
        source=replace(record.source, path=None),
        recipe=_without_paths(record.recipe, "calibration"),
        history=tuple(
            replace(
                entry,
                recipe=_without_paths(entry.recipe, "validation"),
                teacher=entry.teacher and Path(entry.teacher).name,
            )
            for entry in record.history
        ),
    )


def calibrated_on(model: str | Path) -> set[str]:
    """sha256 of the texts that a converted folder was calibrated on."""
    try:
        record = Record.from_json(read_object(Path(model).expanduser() / RECORD))
    except (OSError, LrkvError):
        return set()
    return {text.sha256 for text in record.calibration.texts}


def _without_paths(recipe: dict, field: str) -> dict:
    """A recipe whose files in this field have no paths."""
    return recipe | {field: _names(recipe.get(field))}


def _names(paths: list[str] | None) -> list[str] | None:
    return paths and [Path(path).name for path in paths]


def commands(record: Record, out: str) -> list[str]:
    """`lrkv convert`, and a `lrkv heal` for each round of training, that led to the folder `out`.
    Files by their names, not their paths.
    """
    rounds = len(record.history)
    folders = [f"{out}-{i}" if i < rounds else out for i in range(rounds + 1)]
    folders[0] = f"{out}-converted" if rounds else out
    healing = [
        _heal(entry, before, after)
        for entry, before, after in zip(record.history, folders, folders[1:])
    ]
    return [quoted(list(map(str, words))) for words in (_convert(record, folders[0]), *healing)]


def _convert(record: Record, out: str) -> list[str]:
    recipe, words = record.recipe, ["lrkv", "convert", record.source.name, "--out", out]
    for field in fields(Options):
        value = recipe.get(field.name, field.default)
        if field.name in LEFT_OUT or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "calibration":
            words += [flag, *(_names(value) or ["none"])]
        elif field.name == "refit":
            words.append("--no-refit")
        else:
            words += [flag] if value is True else [flag, str(value)]
    return words


def _heal(entry: Healed, before: str, out: str) -> list[str]:
    recipe, known = entry.recipe, shipped("heal")
    name = recipe["name"] if recipe["name"] in known else "short"
    defaults, recipe = (
        yaml.safe_load(known[name]),
        recipe | {"validation": _names(recipe.get("validation"))},
    )
    words = ["lrkv", "heal", before, "--data", *entry.data, "--out", out, "--recipe", name]
    changed = {
        field: value
        for field, value in recipe.items()
        if field != "name" and defaults.get(field, value) != value
    }
    for field in ("tokens", "loss", "optimizer", "train"):
        if field in changed:
            words += [f"--{field}", str(changed.pop(field))]
    return words + [
        word for field, value in changed.items() for word in ("--set", f"{field}={_setting(value)}")
    ]


def _setting(value) -> str:
    """A value as --set reads it."""
    short = yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]
    try:
        return short if parse(short, "", "") == value else json.dumps(value)
    except LrkvError:
        return json.dumps(value)
