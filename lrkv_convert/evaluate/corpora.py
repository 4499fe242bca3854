"""What perplexity is measured on: the standard corpora of the field, any dataset of the hub, files.

The protocol is that of the literature (GPTQ, Frantar et al. 2023, and most after it): WikiText-2's
raw test split joined by blank lines and read in windows of 2,048 tokens, C4's first validation
documents joined by spaces, 256 windows of them. Two things are ours: the last window counts
although it is shorter, and no BOS token stands at the very beginning. (Published for Llama-2-7B:
5.47 on WikiText-2; not run with this code.)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from ..errors import LrkvError
from ..examples.pairs import Corpus as Pairs
from ..examples.pairs import read_pairs
from ..examples.speech import read_speech
from ..examples.text import Text, read_texts
from ..folder import hub
from .load import family_with_encoder

SEQ_LEN, STANDARD_SEQ_LEN = 512, 2048
# characters, more than tokens have on average in any text: how much is read to have so many tokens
LONGEST_TOKEN = 16


@dataclass(frozen=True)
class Corpus:
    """Where the rows lie, how many are read and what joins them; windows: as many are measured at
    most, None for all.
    """

    repository: str
    config: str | None = None
    split: str = "test"
    files: dict = field(default_factory=dict)
    column: str = "text"
    rows: int | None = None
    between: str = "\n\n"
    windows: int | None = None


CORPORA = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": Corpus(
        "allenai/c4",
        split="validation",
        files={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        rows=1100,
        between=" ",
        windows=256,
    ),
}


def gather(
    files: list[str], datasets: list[str], seq_len: int | None, max_tokens: int | None
) -> tuple[list[Text], int]:
    """Texts of files and datasets, and the window: as asked, or SEQ_LEN, or STANDARD_SEQ_LEN as
    soon as a dataset is among them. Raises LrkvError.
    """
    if not files and not datasets:
        raise LrkvError(
            "there is no text to measure on",
            f"give --text FILE, or --dataset {' or '.join(CORPORA)}",
        )
    seq_len = seq_len or (STANDARD_SEQ_LEN if datasets else SEQ_LEN)
    return [
        *read_texts(files),
        *(read_corpus(name, seq_len, max_tokens) for name in datasets),
    ], seq_len


def gather_pairs(model: str, audio: Sequence[str], pairs: Sequence[str]) -> list[Pairs]:
    """What an encoder-decoder is measured on: folders of speech, or files of pairs. Raises
    LrkvError for what this one does not read.
    """
    speech = family_with_encoder(model).speech
    if bool(audio) != speech or bool(pairs) == speech:
        reads, option = ("speech", "--audio FOLDER") if speech else ("text", "--pairs FILE")
        raise LrkvError(f"{model} reads {reads}", f"give {option}, and nothing else to measure on")
    return [*map(read_speech, audio), *map(read_pairs, pairs)]


def read_corpus(name: str, seq_len: int, max_tokens: int | None = None) -> Text:
    """One of CORPORA, or "org/name:config:split" (column `text`, split test). Raises LrkvError.

    seq_len: some corpora are read to a number of such windows; max_tokens: no more is fetched than
    surely holds so many.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        repository, config, split = hub.parts(name)
        if repository.count("/") != 1 or name.startswith((".", "/", "~")):
            raise LrkvError(
                f"unknown dataset {name!r}",
                f"give {', '.join(CORPORA)}, or org/name:config:split; files go to --text",
            )
        corpus = Corpus(repository, config, split or "test")
    most = None if corpus.windows is None else corpus.windows * seq_len
    documents, enough = [], min(most or sys.maxsize, max_tokens or sys.maxsize) * LONGEST_TOKEN
    for row in islice(
        hub.rows(
            name,
            corpus.repository,
            *([corpus.config] if corpus.config else []),
            split=corpus.split,
            **corpus.files,
        ),
        corpus.rows,
    ):
        if not isinstance(row.get(corpus.column), str):
            raise LrkvError(
                f"{name} has no text in {corpus.column!r}", f"it has {', '.join(map(str, row))}"
            )
        documents.append(row[corpus.column])
        enough -= len(documents[-1])
        if enough <= 0:
            break
    return Text(name, corpus.between.join(documents), most)
