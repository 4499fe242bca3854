"""Text files, jsonl, parquet or a dataset of the hub -> packed windows of tokens on disk, the same
in every process and after every restart.

Files are read side by side, each as far in proportion as the others, datasets in turn, until there
are enough tokens: of a large corpus no more is read (or fetched) than is trained on. Documents
follow one another without padding, the end-of-text token between them, and are cut into windows.
What training reads in a step is then a function of the step alone, which is why a run can be
resumed, and sharded over any number of processes, without changing what it learns from.
"""

import codecs
import hashlib
import heapq
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import LrkvError, first_line
from ..folder import hub
from ..folder.places import expanded
from ..folder.writer import write_json

PIECE = 1 << 16  # bytes of a text file read at once
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
TOKENS, ABOUT = "windows.int32", "windows.json"

# share of the source read so far (of a dataset: rows, as its length is not known), text, whether a
# document ends with it
Piece = tuple[float, str, bool]


# ------------------------------------------------------------------------------------------ sources


def sources(data: list[str], seed: int) -> list[Path | str]:
    """Files (folders are searched for SUFFIXES, in an order drawn from the seed) and ids of
    datasets. Raises LrkvError for what is neither.
    """
    found = []
    for name in data:
        if not name:
            raise LrkvError(
                "the name of a file is empty",
                "give text, jsonl or parquet files, a folder of them, or a dataset such as"
                " org/name:config:split",
            )
        path = expanded(name)
        if path.is_dir():
            files = sorted(
                f
                for f in path.rglob("*")
                if f.suffix in SUFFIXES and f.is_file() and not f.name.startswith(".")
            )
            if not files:
                raise LrkvError(
                    f"{name} holds no {', '.join(SUFFIXES)} file",
                    "give text files, or a folder of them",
                )
            found += [
                files[i]
                for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
            ]
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise LrkvError(f"{name} is of no known kind", f"known: {', '.join(SUFFIXES)}")
            found.append(path)
        elif name.startswith((".", "/", "~")) or path.suffix in SUFFIXES or name.count("/") > 1:
            raise LrkvError(
                f"no such file: {name}",
                "give text, jsonl or parquet files, a folder of them, or a dataset such as"
                " org/name:config:split",
            )
        else:
            found.append(name)
    if not found:
        raise LrkvError("there is no text to train on", "give --data")
    if len({isinstance(source, str) for source in found}) > 1:
        raise LrkvError(
            "files and datasets cannot be read side by side: how long a dataset is, is not known",
            "give files or datasets",
        )
    return found


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


# ------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Windows:
    """Packed windows (n, T): those trained on and those held out.

    tokens: memory-mapped, int32; training, validation: indices of windows; sha256: of all tokens,
    in their order.
    """

    tokens: np.ndarray
    training: Tensor
    validation: Tensor
    sha256: str

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Indices of the windows of a step (0, 1, ...): a new seeded order each time all windows
        were read.
        """
        count, first = len(self.training), step * size
        orders = {
            epoch: torch.randperm(
                count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            )
            for epoch in range(first // count, (first + size - 1) // count + 1)
        }
        return torch.stack(
            [self.training[orders[k // count][k % count]] for k in range(first, first + size)]
        )

    def ids(self, indices: Tensor) -> Tensor:
        """Token ids (n, T) of windows."""
        return torch.from_numpy(self.tokens[indices.numpy()].astype(np.int64))

    def rounds(self, tokens: int) -> float:
        """How often the data is read to train on this many tokens."""
        return tokens / (len(self.training) * self.tokens.shape[1])


class Cutter:
    """Writes windows to a file as they fill.

    file: open for writing; vocabulary: how many tokens the model knows. Afterwards `windows` says
    how many there are, `digest` has their sha256.
    """

    def __init__(self, file: BinaryIO, tokenizer, seq_len: int, vocabulary: int):
        self.file, self.tokenizer, self.seq_len, self.vocabulary = (
            file,
            tokenizer,
            seq_len,
            vocabulary,
        )
        self.windows, self.digest = 0, hashlib.sha256()

    def cut(self, what: str, data: list[str], most: int, field: str, seed: int) -> int:
        """Up to `most` windows of the data; how many they are. Raises LrkvError for data too short
        for one, naming it `what`, and for tokens that the model does not know.
        """
        between = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        first, buffer = self.windows, []
        for text, ends in side_by_side(sources(data, seed), field):
            buffer += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + (
                between if ends else []
            )
            whole = min(len(buffer) // self.seq_len, most - (self.windows - first))
            if whole:
                rows = np.array(buffer[: whole * self.seq_len], dtype=np.int32)
                if rows.max() >= self.vocabulary:
                    raise LrkvError(
                        f"the tokenizer gives the token {rows.max()}, the model knows"
                        f" {self.vocabulary}",
                        "the tokenizer does not belong to this model",
                    )
                self.file.write(rows.tobytes())
                self.digest.update(rows.tobytes())
                self.windows += whole
                del buffer[: whole * self.seq_len]
            if self.windows - first == most:
                break
        if self.windows == first:
            raise LrkvError(
                f"{what} is empty or too short: it does not fill one window of {self.seq_len}"
                " tokens",
                "give more text, or a smaller seq_len",
            )
        return self.windows - first


def pack(
    data: list[str],
    tokenizer,
    folder: Path,
    *,
    seq_len: int,
    tokens: int,
    validation: list[str] | None,
    validation_tokens: int,
    field: str,
    seed: int,
    vocabulary: int,
) -> None:
    """Tokenise and write what `packed` reads into `folder`. Raises LrkvError for data that cannot
    be read, is too short or has tokens the model does not know.
    """
    held = max(1, validation_tokens // seq_len)
    with open(folder / TOKENS, "wb") as file:
        cutter, most = (
            Cutter(file, tokenizer, seq_len, vocabulary),
            -(-tokens // seq_len) + (0 if validation else held),
        )
        count = cutter.cut("the data", data, most, field, seed)
        if validation:
            chosen = count + torch.arange(
                cutter.cut("the validation text", validation, held, field, seed)
            )
        else:
            # of a text that ran out, a tenth at most
            held = held if count == most else min(held, max(1, count // 10))
            chosen = torch.linspace(0, count - 1, held + 2)[1:-1].round().long()
    training = torch.tensor(sorted(set(range(count)) - set(chosen.tolist())), dtype=torch.long)
    if not len(training):
        raise LrkvError(
            f"the data fills {count} window(s) of {seq_len} tokens: too short to train on and hold"
            " some out",
            "give more text, or a smaller seq_len",
        )
    write_json(
        folder / ABOUT,
        {
            "seq_len": seq_len,
            "training": training.tolist(),
            "validation": chosen.tolist(),
            "sha256": cutter.digest.hexdigest(),
        },
    )


def packed(folder: Path) -> Windows | None:
    """What `pack` wrote, or None."""
    if not (folder / ABOUT).is_file():  # written last
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    tokens = np.memmap(folder / TOKENS, dtype=np.int32, mode="r").reshape(-1, about["seq_len"])
    return Windows(
        tokens, torch.tensor(about["training"]), torch.tensor(about["validation"]), about["sha256"]
    )
