"""Text files, jsonl, parquet or a dataset of the hub -> documents, a piece at a time.

Files are read side by side, each as far in proportion as the others, datasets in turn: whoever has
enough stops, and of a large corpus no more is read (or fetched) than is used.
"""

import codecs
import heapq
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import LrkvError, first_line
from ..folder import hub
from ..folder.places import expanded

PIECE = 1 << 16  # bytes of a text file read at once
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
KINDS = (
    "give text, jsonl or parquet files, a folder of them, or a dataset such as"
    " org/name:config:split"
)

# share of the source read so far (of a dataset: rows, as its length is not known), text, whether a
# document ends with it
Piece = tuple[float, str, bool]


def sources(data: list[str], seed: int) -> list[Path | str]:
    """Files (folders are searched for SUFFIXES, in an order drawn from the seed) and ids of
    datasets. Raises LrkvError for what is neither.
    """
    found = [source for name in data for source in _named(name, seed)]
    if not found:
        raise LrkvError("there is no text to train on", "give --data")
    if len({isinstance(source, str) for source in found}) > 1:
        raise LrkvError(
            "files and datasets cannot be read side by side: how long a dataset is, is not known",
            "give files or datasets",
        )
    return found


def _named(name: str, seed: int) -> list[Path | str]:
    """What one name of --data stands for. Raises LrkvError."""
    if not name:
        raise LrkvError("the name of a file is empty", KINDS)
    path = expanded(name)
    if path.is_dir():
        return _inside(path, name, seed)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise LrkvError(f"{name} is of no known kind", f"known: {', '.join(SUFFIXES)}")
        return [path]
    if name.startswith((".", "/", "~")) or path.suffix in SUFFIXES or name.count("/") > 1:
        raise LrkvError(f"no such file: {name}", KINDS)
    return [name]


def _inside(folder: Path, name: str, seed: int) -> list[Path | str]:
    """The files of a folder that can be read, in an order drawn from the seed."""
    files = sorted(
        f
        for f in folder.rglob("*")
        if f.suffix in SUFFIXES and f.is_file() and not f.name.startswith(".")
    )
    if not files:
        raise LrkvError(
            f"{name} holds no {', '.join(SUFFIXES)} file", "give text files, or a folder of them"
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return [files[i] for i in order]


def pieces(source: Path | str, field: str) -> Iterator[Piece]:
    """The texts of a source. No file stays open between two of them. Raises LrkvError for what
    cannot be read.
    """
    try:
        if isinstance(source, str):
            yield from _dataset(source, field)
        elif source.suffix == ".jsonl":
            yield from _jsonl(source, field)
        elif source.suffix == ".parquet":
            yield from _parquet(source, field)
        else:
            yield from _text(source)
    except OSError as error:
        raise LrkvError(
            f"cannot read {source}: {error.strerror or first_line(error)}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise LrkvError(
            f"{source} is not UTF-8 text", "convert it, or give another file"
        ) from error


def _blocks(file: Path, longest_line: int = -1) -> Iterator[tuple[float, bytes]]:
    """(share of the file read so far, about PIECE bytes that end with a line)."""
    size, at = file.stat().st_size, 0
    while at < size:
        with open(file, "rb") as stream:
            stream.seek(at)
            block = stream.read(PIECE) + stream.readline(longest_line)
        at += len(block)
        yield at / size, block


def _text(file: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for share, block in _blocks(file, longest_line=PIECE):
        yield share, decoder.decode(block, final=share == 1), share == 1


def _jsonl(file: Path, field: str) -> Iterator[Piece]:
    number, before = 0, 0.0
    for share, block in _blocks(file):
        lines = block.splitlines()
        for i, line in enumerate(lines, 1):
            number += 1
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise LrkvError(
                        f"line {number} of {file} is not JSON", "jsonl has one object per line"
                    ) from error
                yield from _row(
                    before + (share - before) * i / len(lines),
                    row,
                    field,
                    f"line {number} of {file}",
                )
        before = share


def _parquet(file: Path, field: str) -> Iterator[Piece]:
    if importlib.util.find_spec("pyarrow") is None:
        raise LrkvError(f"to read {file}, pyarrow is needed", "pip install 'lrkv-convert[data]'")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    def opened() -> ParquetFile:
        try:
            return ParquetFile(file)
        except ArrowInvalid as error:
            raise LrkvError(
                f"{file} is not parquet: {first_line(error)}", "is it whole?"
            ) from error

    with opened() as about:
        groups, rows, names = (
            about.num_row_groups,
            about.metadata.num_rows,
            about.schema_arrow.names,
        )
    if field not in names:
        raise LrkvError(
            f"{file} has no column {field!r}", f"it has {', '.join(names)}: --set text_field=NAME"
        )
    done = 0
    for group in range(groups):
        with opened() as reader:
            column = reader.read_row_group(group, columns=[field]).column(0).to_pylist()
        for value in column:
            done += 1
            yield from _row(done / rows, {field: value}, field, f"row {done} of {file}")


def _dataset(name: str, field: str) -> Iterator[Piece]:
    """name: "org/name", "org/name:config" or "org/name:config:split", streamed."""
    repository, config, split = hub.parts(name)
    for number, row in enumerate(hub.rows(name, repository, config, split=split or "train"), 1):
        yield from _row(number, row, field, f"row {number} of {name}")


def _row(share: float, row, field: str, where: str) -> Iterator[Piece]:
    """The document of a row; none where the field is null."""
    if not isinstance(row, dict) or not isinstance(row.get(field, 0), str | None):
        known = (
            f"it has {', '.join(map(str, row))}: --set text_field=NAME"
            if isinstance(row, dict)
            else "it is no object"
        )
        raise LrkvError(f"{where} has no text in {field!r}", known)
    if row[field]:
        # JSON may hold halves of characters
        yield share, row[field].encode("utf-8", "replace").decode(), True


def side_by_side(found: list[Path | str], field: str) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends), always from the source of which the smallest share was
    read.
    """
    readers = [(0.0, i, pieces(source, field)) for i, source in enumerate(found)]
    while readers:
        _share, i, reader = readers[0]
        if (piece := next(reader, None)) is None:
            heapq.heappop(readers)
        else:
            heapq.heapreplace(readers, (piece[0], i, reader))
            yield piece[1:]
