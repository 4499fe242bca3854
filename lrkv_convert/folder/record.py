"""lrkv.json, the record in every folder this project writes, read back: whole, or refused in one
line."""

from pathlib import Path

from ..errors import LrkvError
from ..format import Record
from ..schema import read_object
from .card import model_card
from .provenance import commands, published
from .writer import RECORD


def read_record(folder: Path) -> Record:
    """The record of a converted folder. Raises LrkvError for any other folder, and for a record
    that says not all that the model card, the commands and the public record are made of: those
    are made here once, so that nothing is missed hours later."""
    if not folder.is_dir():
        raise LrkvError(
            f"there is no folder {folder}",
            "give the folder of a converted model; one of the hub must be downloaded first",
        )
    try:
        content = read_object(folder / RECORD)
    except OSError as error:
        raise LrkvError(
            f"{folder} is not a converted model: it has no {RECORD}",
            "make one with lrkv convert MODEL --out DIR",
        ) from error
    record = Record.from_json(content, str(folder / RECORD))
    try:
        model_card(record, {}, "model")
        commands(published(record), "model")
    # a recipe is as its options are: what is of another kind there raises whatever that leads to
    except Exception as error:
        found = error.__cause__ or error
        said = f"{type(found).__name__} {found}".replace("\n", " ")
        raise LrkvError(
            f"{folder / RECORD} is not as lrkv convert wrote it: {said}", "convert the model again"
        ) from error
    return record
