"""Text -> packed windows of tokens on disk, the same in every process and after every restart.

Documents follow one another without padding, the end-of-text token between them, and are cut into
windows, until there are enough tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import LrkvError
from ..examples.example import Example, windows_of
from ..examples.retrieval import windows as retrieval_windows
from ..folder.writer import write_json
from .data import Data, held_out
from .sources import side_by_side, sources

TOKENS, ABOUT = "windows.int32", "windows.json"
PROSE = 8  # letters a token, more than enough


@dataclass(frozen=True)
class Windows(Data):
    """Packed windows (n, T). tokens: memory-mapped, int32."""

    tokens: np.ndarray

    noun = "windows"

    def ids(self, indices: Tensor) -> Tensor:
        """Token ids (n, T) of windows."""
        return torch.from_numpy(self.tokens[indices.numpy()].astype(np.int64))

    def examples(self, indices: Tensor) -> list[Example]:
        return windows_of(self.ids(indices))

    def tokens_of(self, indices: Tensor) -> int:
        return len(indices) * self.tokens.shape[1]

    def predicted_of(self, indices: Tensor) -> int:
        return len(indices) * (self.tokens.shape[1] - 1)


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
                self.write(np.array(buffer[: whole * self.seq_len], dtype=np.int32))
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

    def hide(self, data: list[str], count: int, field: str, seed: int) -> int:
        """`count` windows of retrieval texts in the prose of the data. Raises LrkvError."""
        prose: list[str] = []
        for text, _ in side_by_side(sources(data, seed), field):
            prose.append(text)
            if sum(map(len, prose)) > PROSE * count * self.seq_len:
                break
        try:
            for ids in retrieval_windows(
                self.tokenizer, " ".join(prose), self.seq_len, count, seed
            ):
                self.write(np.array(ids, dtype=np.int32))
        except ValueError as error:
            raise LrkvError(str(error), "give a larger seq_len, or retrieval 0") from error
        return count

    def write(self, rows: np.ndarray) -> None:
        """Whole windows. Raises LrkvError for tokens that the model does not know."""
        if rows.max() >= self.vocabulary:
            raise LrkvError(
                f"the tokenizer gives the token {rows.max()}, the model knows {self.vocabulary}",
                "the tokenizer does not belong to this model",
            )
        self.file.write(rows.tobytes())
        self.digest.update(rows.tobytes())
        self.windows += len(rows) // self.seq_len


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
    retrieval: float = 0.0,
) -> None:
    """Tokenise and write what `packed` reads into `folder`. retrieval: share of the windows trained
    on that are retrieval texts. Raises LrkvError for data that cannot be read, is too short or has
    tokens the model does not know.
    """
    held = max(1, validation_tokens // seq_len)
    most = -(-tokens // seq_len) + (0 if validation else held)
    most -= round(retrieval * (-(-tokens // seq_len)))
    with open(folder / TOKENS, "wb") as file:
        cutter = Cutter(file, tokenizer, seq_len, vocabulary)
        count = cutter.cut("the data", data, most, field, seed)
        if validation:
            own = cutter.cut("the validation text", validation, held, field, seed)
            training, chosen = torch.arange(count), count + torch.arange(own)
        else:
            training, chosen = held_out(count, held, whole=count == most)
        if retrieval and len(training):
            # as large a share of what there is, if text ran out
            hidden, before = round(retrieval / (1 - retrieval) * len(training)), cutter.windows
            cutter.hide(data, hidden, field, seed)
            training = torch.cat((training, torch.arange(before, cutter.windows)))
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
        torch.tensor(about["training"]), torch.tensor(about["validation"]), about["sha256"], tokens
    )
