"""Text files, jsonl, parquet or a dataset of the hub -> packed windows of tokens on disk, the same in every process and after every restart.

All sources are read side by side, each as far in proportion as the others, until there are enough tokens: of a large corpus no more is read (or
fetched) than is trained on. Documents follow one another without padding, the end-of-text token between them, and are cut into windows. What
training reads in a step is then a function of the step alone, which is why a run can be resumed, and sharded over any number of processes,
without changing what it learns from.
"""
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LrkvError, first_line
from ..writer import write_json

PIECE = 1 << 16             # bytes of a text file read at once
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
FILE, ABOUT = "windows.npy", "windows.json"


# ------------------------------------------------------------------------------------------------ sources

def sources(data: list[str], seed: int) -> list[Path | str]:
    """Files (folders are searched for SUFFIXES, in an order drawn from the seed) and ids of datasets. Raises LrkvError for what is neither."""
    found = []
    for name in data:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
            if not files:
                raise LrkvError(f"{name} holds no {', '.join(SUFFIXES)} file", "give text files, or a folder of them")
            found += [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))]
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise LrkvError(f"{name} is of no known kind", f"known: {', '.join(SUFFIXES)}")
            found.append(path)
        elif name.startswith((".", "/", "~")) or path.suffix in SUFFIXES or name.count("/") > 1 or not name:
            raise LrkvError(f"no such file: {name}", "give text, jsonl or parquet files, a folder of them, or a dataset such as org/name:config:split")
        else:
            found.append(name)
    if not found:
        raise LrkvError("there is no text to train on", "give --data")
    return found


def pieces(source: Path | str, field: str) -> Iterator[tuple[float, str, bool]]:
    """(share of the source read so far, text, whether a document ends with it). Raises LrkvError for what cannot be read."""
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
        raise LrkvError(f"cannot read {source}: {error.strerror or first_line(error)}", "check the path") from error
    except UnicodeDecodeError as error:
        raise LrkvError(f"{source} is not UTF-8 text", "convert it, or give another file") from error


def _text(file: Path) -> Iterator[tuple[float, str, bool]]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        while part := stream.read(PIECE) + stream.readline():
            yield stream.tell() / size, part.decode("utf-8"), stream.tell() >= size


def _jsonl(file: Path, field: str) -> Iterator[tuple[float, str, bool]]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        for number, line in enumerate(iter(stream.readline, b""), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise LrkvError(f"line {number} of {file} is not JSON", "jsonl has one object per line") from error
                yield stream.tell() / size, _field(row, field, f"line {number} of {file}"), True


def _parquet(file: Path, field: str) -> Iterator[tuple[float, str, bool]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise LrkvError(f"to read {file}, pyarrow is needed", "pip install 'lrkv-convert[data]'")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile
    try:
        opened = ParquetFile(file)
    except ArrowInvalid as error:
        raise LrkvError(f"{file} is not parquet: {first_line(error)}", "is it whole?") from error
    if field not in opened.schema_arrow.names:
        raise LrkvError(f"{file} has no column {field!r}", f"it has {', '.join(opened.schema_arrow.names)}: set text_field")
    done = 0
    for batch in opened.iter_batches(columns=[field], batch_size=256):
        for value in batch.column(0).to_pylist():
            done += 1
            yield done / opened.metadata.num_rows, _field({field: value}, field, f"row {done} of {file}"), True


def _dataset(name: str, field: str) -> Iterator[tuple[float, str, bool]]:
    """name: "org/name", "org/name:config" or "org/name:config:split", streamed; how long it is, is not known."""
    if importlib.util.find_spec("datasets") is None:
        raise LrkvError(f"{name} is no file, and to stream it as a dataset `datasets` is needed", "pip install 'lrkv-convert[data]'")
    from datasets import load_dataset
    repository, config, split = (name.split(":") + ["", ""])[:3]
    try:
        stream = load_dataset(repository, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(stream, 1):
            yield number / 1e12, _field(row, field, f"row {number} of {name}"), True
    except LrkvError:
        raise
    except Exception as error:          # the hub, the network and every file format raise their own
        raise LrkvError(f"cannot read the dataset {name}: {first_line(error)}", "write org/name:config:split, or give files") from error


def _field(row, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = f"it has {', '.join(map(str, row))}: set text_field" if isinstance(row, dict) else "it is no object"
        raise LrkvError(f"{where} has no text in {field!r}", known)
    return row[field]


def side_by_side(found: list[Path | str], field: str) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends), always from the source of which the smallest share was read."""
    readers = [(0.0, i, pieces(source, field)) for i, source in enumerate(found)]
    while readers:
        share, i, reader = min(readers, key=lambda r: r[:2])
        readers.remove((share, i, reader))
        if (piece := next(reader, None)) is not None:
            readers.append((piece[0], i, reader))
            yield piece[1:]


# ------------------------------------------------------------------------------------------------ windows

@dataclass(frozen=True)
class Windows:
    """Packed windows (n, T): those trained on and those held out.

    tokens: memory-mapped, int32; training, validation: indices of windows; sha256: of all tokens, in their order.
    """

    tokens: np.ndarray
    training: Tensor
    validation: Tensor
    sha256: str

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Indices of the windows of a step (0, 1, ...): a new seeded order each time all windows were read."""
        count, first = len(self.training), step * size
        orders = {epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
                  for epoch in range(first // count, (first + size - 1) // count + 1)}
        return torch.stack([self.training[orders[k // count][k % count]] for k in range(first, first + size)])

    def ids(self, indices: Tensor) -> Tensor:
        """Token ids (n, T) of windows."""
        return torch.from_numpy(self.tokens[indices.numpy()].astype(np.int64))

    def rounds(self, tokens: int) -> float:
        """How often the data is read to train on this many tokens."""
        return tokens / (len(self.training) * self.tokens.shape[1])


def pack(data: list[str], tokenizer, folder: Path, *, seq_len: int, tokens: int, validation: list[str] | None, validation_tokens: int, field: str,
         seed: int, vocabulary: int) -> None:
    """Tokenise and write what `packed` reads into `folder`. Raises LrkvError for data that cannot be read, is too short or has tokens the model does not know."""
    held = max(1, validation_tokens // seq_len)
    rows = _cut(data, tokenizer, seq_len, -(-tokens // seq_len) + (0 if validation else held), field, seed)
    if validation:
        apart = _cut(validation, tokenizer, seq_len, held, field, seed)
        chosen = torch.arange(len(rows), len(rows) + len(apart))
        rows = np.concatenate([rows, apart])
    else:
        held = min(held, max(1, len(rows) // 10))       # of a short text a tenth
        chosen = torch.linspace(0, len(rows) - 1, held + 2)[1:-1].round().long()
    training = torch.tensor(sorted(set(range(len(rows))) - set(chosen.tolist())), dtype=torch.long)
    if not len(training) or not len(chosen):
        raise LrkvError(f"the data fills {len(rows)} window(s) of {seq_len} tokens: too short to train on and hold some out", "give more text, or a smaller seq_len")
    if rows.max() >= vocabulary:
        raise LrkvError(f"the tokenizer gives the token {rows.max()}, the model knows {vocabulary}", "the tokenizer does not belong to this model")
    np.save(folder / FILE, rows)
    write_json(folder / ABOUT, {"training": training.tolist(), "validation": chosen.tolist(), "sha256": hashlib.sha256(rows.tobytes()).hexdigest()})


def packed(folder: Path) -> Windows | None:
    """What `pack` wrote, or None."""
    if not (folder / ABOUT).is_file():      # written last
        return None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return Windows(np.load(folder / FILE, mmap_mode="r"), torch.tensor(about["training"]), torch.tensor(about["validation"]), about["sha256"])


def _cut(data: list[str], tokenizer, seq_len: int, most: int, field: str, seed: int) -> np.ndarray:
    """At most `most` windows (n, T) of the data."""
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    windows, buffer, cut = [], [], 0
    for text, ends in side_by_side(sources(data, seed), field):
        buffer += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + (between if ends else [])
        whole = len(buffer) // seq_len
        if whole:
            windows.append(np.array(buffer[:whole * seq_len], dtype=np.int32).reshape(whole, seq_len))
            del buffer[:whole * seq_len]
            cut += whole
        if cut >= most:
            break
    if not windows:
        raise LrkvError(f"the data is empty or too short: it does not fill one window of {seq_len} tokens", "give more text, or a smaller seq_len")
    return np.concatenate(windows)[:most]
