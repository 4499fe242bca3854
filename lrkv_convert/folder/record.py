"""lrkv.json, the record in every folder this project writes, read back: whole, or refused in one
line."""

from pathlib import Path

from ..errors import LrkvError
from ..source.configs import read_object
from .card import model_card
from .provenance import commands, published
from .writer import RECORD


def read_record(folder: Path) -> dict:
    """The record of a converted folder. Raises LrkvError for any other folder, and for a record
    that says not all that the model card, the commands and the public record are made of: those
    are made here once, so that nothing is missed hours later."""
    if not folder.is_dir():
        raise LrkvError(
            f"there is no folder {folder}",
            "give the folder of a converted model; one of the hub must be downloaded first",
        )
    try:
        record = read_object(folder / RECORD)
    except OSError as error:
        raise LrkvError(
            f"{folder} is not a converted model: it has no {RECORD}",
            "make one with lrkv convert MODEL --out DIR",
        ) from error
    record = upgraded(record)
    try:
        model_card(record, {}, "model")
        commands(published(record), "model")
    except Exception as error:  # what is missing, or of another kind, raises whatever that leads to
        found = error.__cause__ or error
        raise LrkvError(
            f"{folder / RECORD} is not as lrkv writes it: {type(found).__name__} {found}".replace(
                "\n", " "
            ),
            "convert the model again",
        ) from error
    return record


def upgraded(record: dict) -> dict:
    """A record as it is written today. Format 1 had one kind of attention, of decoders, at the top;
    what is no record at all is left for others to refuse.
    """
    moved = ("cache", "keys", "geometry", "layers")
    if "attention" in record or not all(name in record for name in moved):
        return record
    rest = {name: value for name, value in record.items() if name not in moved}
    return rest | {"format": 2, "attention": {"self": {name: record[name] for name in moved}}}
