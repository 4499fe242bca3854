"""Texts, and the windows of tokens that are cut from them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import LrkvError
from ..folder.places import expanded

SEQ_LEN = 512
BUILT_IN = "built-in"
SELF = "self"  # as a calibration text: what the model itself writes
SAMPLED_AT_ONCE, SAMPLED = 16, 10**7  # documents; tokens in all, which take days


@dataclass(frozen=True)
class Text:
    """A named text. `sha256` is of its UTF-8 bytes; max_tokens: no more than its first so many are
    meant.
    """

    name: str
    content: str
    max_tokens: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(paths: list[str]) -> list[Text]:
    """Texts from files and folders (every *.txt and *.md inside), and BUILT_IN for the text that
    ships with this package. Raises LrkvError.
    """
    texts = []
    for name in paths:
        if not name:
            raise LrkvError("the name of a text is empty", "give text files, or folders of them")
        path = expanded(name)
        if name == BUILT_IN:
            texts.append(
                Text(
                    BUILT_IN,
                    resources.files("lrkv_convert")
                    .joinpath("data/calibration.txt")
                    .read_text(encoding="utf-8"),
                )
            )
            continue
        with reading(path):
            files = (
                sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md"))
                if path.is_dir()
                else [path]
            )
        if not files:
            raise LrkvError(
                f"{path} holds no .txt or .md file", "give text files, or a folder of them"
            )
        for file in files:
            if file.suffix in (".json", ".jsonl"):
                raise LrkvError(
                    f"{file} is JSON, not text", "write what is to be read into a .txt file"
                )
            with reading(file):
                texts.append(Text(file.name, file.read_text(encoding="utf-8")))
    return texts


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever stands against reading a text becomes a refusal."""
    try:
        yield
    except OSError as error:
        raise LrkvError(
            f"cannot read the text {file}: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise LrkvError(f"{file} is not UTF-8 text", "convert it, or give another text") from error


def read_one(path: str) -> Text:
    """One text from a file, or from a folder that holds one. Raises LrkvError."""
    texts = read_texts([path])
    if len(texts) > 1:
        raise LrkvError(f"{path} holds {len(texts)} texts", "give one of them")
    return texts[0]


def sample_text(model: PreTrainedModel, tokenizer, tokens: int, seed: int = 0) -> Text:
    """About `tokens` tokens sampled from the model at temperature 1, in documents of one window,
    each begun anew from the BOS token. Raises LrkvError.
    """
    if tokens > SAMPLED:
        raise LrkvError(
            f"{tokens:,} tokens are more than a model can be let write",
            f"give --calibration-tokens of at most {SAMPLED:,} with self",
        )
    length, starts = (
        window_length(model.config),
        getattr(model.generation_config, "bos_token_id", None),
    )
    starts = tokenizer.eos_token_id if starts is None else starts
    embedding: Any = model.get_input_embeddings()
    check_ids(
        torch.tensor(len(tokenizer) - 1 if starts is None else starts),
        embedding.weight.shape[0],
        model.name_or_path,
    )
    generate: Any = model.generate
    # decoding and tokenising again may lose a few tokens
    rows, documents = [], tokens // length + 2
    model.generation_config = GenerationConfig()  # its own may bend the distribution
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for n in range(0, documents, SAMPLED_AT_ONCE):
            count = min(SAMPLED_AT_ONCE, documents - n)
            first = (
                torch.randint(len(tokenizer), (count, 1))
                if starts is None
                else torch.full((count, 1), starts)
            )
            rows.extend(
                generate(
                    first.to(model.device),
                    attention_mask=torch.ones_like(first).to(model.device),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=length - 1,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            )
    return Text(SELF, "\n\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows))


def window_length(config) -> int:
    """Tokens per calibration window: SEQ_LEN, or what the model can read."""
    return min(
        SEQ_LEN,
        getattr(config, "max_position_embeddings", None)
        or getattr(config, "max_seq_len", None)
        or SEQ_LEN,
    )


def check_ids(ids: Tensor, rows: int, model: str | None) -> None:
    """Raise LrkvError for token ids that an embedding of so many rows does not have."""
    if ids.numel() and (largest := int(ids.max())) >= rows:
        raise LrkvError(
            f"the tokenizer of {model} gives the id {largest:,}, its embedding has {rows:,} rows",
            "tokenizer and weights do not belong together",
        )


def windows(texts: list[Text], tokenizer, seq_len: int, max_tokens: int) -> Tensor:
    """Token windows (n, T), an equal share of each text, spread evenly over it. Raises LrkvError if
    no text fills one window.
    """
    cut = []
    for text in texts:
        ids = torch.tensor(
            tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"],
            dtype=torch.long,
        )
        # (all, T)
        whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
        keep = min(len(whole), max(1, max_tokens // len(texts) // seq_len))
        cut.append(whole[torch.linspace(0, len(whole) - 1, keep).round().long()] if keep else whole)
    found = torch.cat(cut)
    if not len(found):
        raise LrkvError(
            f"the calibration text is empty or too short: no text fills one window of {seq_len}"
            " tokens",
            "give a longer text, or several kilobytes of anything like what the model will read",
        )
    return found
