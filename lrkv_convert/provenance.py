"""The commands that made a converted folder, read back from its lrkv.json."""
import shlex
from dataclasses import fields
from pathlib import Path

import yaml

from .options import Options
from .recipe import shipped

LEFT_OUT = ("recipe", "max_shard_size")     # not in the record: what they decide is


def source_name(record: dict) -> str:
    """What was converted: a hub id, or the last part of a path, which says nothing to others."""
    name = record["source"]["name"]
    return Path(name).name if Path(name).exists() or name.startswith(("/", ".", "~")) else name


def commands(record: dict, out: str) -> list[str]:
    """`lrkv convert`, and a `lrkv heal` for each round of training, that led to the folder `out`. Files by their names, not their paths."""
    folders = [f"{out}-{i}" if i < len(record["history"]) else out for i in range(len(record["history"]) + 1)]
    folders[0] = f"{out}-converted" if record["history"] else out
    healing = [_heal(entry, before, after) for entry, before, after in zip(record["history"], folders, folders[1:])]
    return [shlex.join(words) for words in (_convert(record, folders[0]), *healing)]


def _convert(record: dict, out: str) -> list[str]:
    recipe, words = record["recipe"], ["lrkv", "convert", source_name(record), "--out", out]
    for field in fields(Options):
        value = recipe.get(field.name, field.default)
        if field.name in LEFT_OUT or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "calibration":
            words += [flag, *([name if name in ("self", "built-in") else Path(name).name for name in value] or ["none"])]
        elif field.name == "refit":
            words.append("--no-refit")
        else:
            words += [flag] if value is True else [flag, str(value)]
    return words


def _heal(entry: dict, before: str, out: str) -> list[str]:
    recipe, known = entry["recipe"], shipped("heal")
    name = recipe["name"] if recipe["name"] in known else "short"
    defaults = yaml.safe_load(known[name])
    words = ["lrkv", "heal", before, "--data", *entry["data"], "--out", out, "--recipe", name]
    changed = {field: value for field, value in recipe.items() if field != "name" and defaults.get(field, value) != value}
    for field in ("tokens", "loss", "optimizer", "train"):
        if field in changed:
            words += [f"--{field}", str(changed.pop(field))]
    return words + [word for field, value in changed.items() for word in ("--set", f"{field}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")]
