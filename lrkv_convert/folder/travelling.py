"""The modelling files that travel with a converted folder, so that plain transformers loads it.

A release of transformers may need newer ones than a folder was written with; `refresh` puts today's
in their place. Weights and config are left alone.
"""

import importlib
import json
import os
from inspect import getfile
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..errors import LrkvError
from ..modeling import CLASSES, auto_map
from ..source.configs import read_config_json
from .writer import RECORD


def travelling_files(model_type: str) -> list[Path]:
    """The files that a family's models need, its own first. model_type: the original's, e.g.
    "llama".
    """
    own = getfile(importlib.import_module(f"lrkv_convert.modeling.modeling_lrkv_{model_type}"))
    return [Path(own), *map(Path, get_relative_import_files(own))]


def write_modeling(folder: Path, model_type: str) -> list[str]:
    """Put today's files into a folder, each whole or not at all; gives the names of those that
    changed.
    """
    changed = []
    # what is imported before what imports it
    for file in reversed(travelling_files(model_type)):
        there = folder / file.name
        if there.is_file() and there.read_bytes() == file.read_bytes():
            continue
        put(there, file.read_bytes())
        changed.append(file.name)
    return changed


def put(file: Path, data: bytes) -> None:
    """A file whole or not at all, in the place of a link: what a snapshot of the hub links to is
    shared."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, file)


def refresh(folder: str | Path) -> list[str]:
    """Bring the modelling files of a converted folder up to date. Returns the names of those that
    changed. Raises LrkvError.

    Needed when the folder was converted by an older lrkv-convert than the installed transformers
    asks for; loading it with this package imported uses the package's own classes and needs no
    refresh.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECORD).is_file():
        raise LrkvError(
            f"{folder} is no converted folder", "give one that lrkv convert or lrkv heal wrote"
        )
    try:
        config = read_config_json(folder, str(folder))
        model_type = config.get("model_type", "")
        family = model_type.removeprefix("lrkv_")
        if family not in CLASSES or family == model_type:
            raise LrkvError(
                f"{folder} is of the family {model_type!r}, which this version does not know",
                "update lrkv-convert",
            )
        changed = write_modeling(folder, family)
        if config.get("auto_map") != auto_map(family):
            changes = config | {"auto_map": auto_map(family)}
            put(folder / "config.json", f"{json.dumps(changes, indent=2)}\n".encode())
            changed.append("config.json")
    except OSError as error:
        raise LrkvError(
            f"cannot write into {folder}: {error.strerror or error}",
            "check permissions and free space",
        ) from error
    return changed
