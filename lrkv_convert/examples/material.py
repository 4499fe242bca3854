"""What a model is calibrated on: texts, pairs of texts, speech, or what the model writes itself,
read first and made into examples once the weights were looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LrkvError
from ..families import Family
from ..source import Checkpoint
from .example import Example, tokens_of, windows_of
from .pairs import Corpus, read_pairs
from .prepare import prepare
from .reader import Reader
from .speech import read_speech
from .text import (
    BUILT_IN,
    SELF,
    Text,
    check_ids,
    read_texts,
    sample_text,
    window_length,
    windows,
)

Load = Callable[[], PreTrainedModel]  # the whole original model, where it must write something


@dataclass
class Material:
    """texts, corpora: what was read, texts of a decoder or corpora of an encoder-decoder; itself:
    whether the model is to write a text, too; tokens: how many are to be read.
    """

    family: Family
    tokens: int
    texts: list[Text] = field(default_factory=list)
    corpora: list[Corpus] = field(default_factory=list)
    itself: bool = False
    given: int = 1
    written: int = 0

    def __bool__(self) -> bool:
        return bool(self.texts or self.corpora or self.itself)

    def examples(
        self, checkpoint: Checkpoint, load: Load, progress: Callable[[int, int], None]
    ) -> list[Example]:
        """As tensors. load: makes the whole model where targets are missing or a text is to be
        sampled, the only step that holds it in memory. Raises LrkvError.
        """
        if self.family.encoder is None:
            return self._windows(checkpoint, checkpoint.tokenizer(), load)
        reader = Reader(
            checkpoint.path,
            self.family,
            checkpoint.tokenizer(),
            checkpoint.config,
            checkpoint.generation_config(),
        )
        found = prepare(self.corpora, reader, self.tokens, load, progress)
        self.written = found.written
        return found.examples()

    def _windows(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, load: Load
    ) -> list[Example]:
        if self.itself:
            sampled = sample_text(load(), tokenizer, self.tokens // self.given)
            self.texts, self.itself = [*self.texts, sampled], False
        rows = windows(self.texts, tokenizer, window_length(checkpoint.config), self.tokens)
        check_ids(rows, checkpoint.config.vocab_size, checkpoint.source)
        return windows_of(rows)

    def record(self, examples: list[Example] | None) -> dict:
        """What lrkv.json says of it."""
        texts = [
            {"name": t.name, "sha256": t.sha256, "bytes": len(t.content.encode())}
            for t in self.texts
        ] + [
            {"name": c.name, "sha256": c.sha256, "examples": len(c.examples)} for c in self.corpora
        ]
        lengths = {example.tokens for example in examples or []}
        return {
            "texts": texts,
            "examples": len(examples or []),
            "tokens": tokens_of(examples or []),
            "seq_len": lengths.pop() if self.texts and len(lengths) == 1 else 0,
            "targets_by_the_model": self.written,
        }


def gather(calibration: list[str] | None, tokens: int, family: Family) -> Material:
    """Read what calibration names (None: the text that ships here). Raises LrkvError for what
    cannot be read, or is not what this family reads.
    """
    if family.encoder is None:
        given = [BUILT_IN] if calibration is None else calibration
        texts = read_texts([name for name in given if name != SELF])
        return Material(family, tokens, texts, [], SELF in given, max(1, len(given)))
    if calibration is None and family.speech:
        raise LrkvError(
            "a speech model is calibrated on speech, and none was given",
            "give --calibration FOLDER of .wav files; lrkv convert takes none, too, for the weights"
            " alone",
        )
    given = [BUILT_IN] if calibration is None else calibration
    if SELF in given:
        raise LrkvError(
            "an encoder-decoder reads something before it writes: self is no calibration for it",
            "give sources; where targets are missing, it writes them itself",
        )
    read = read_speech if family.speech else read_pairs
    return Material(family, tokens, [], [read(path) for path in given])
