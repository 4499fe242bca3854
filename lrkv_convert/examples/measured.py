"""What a model is measured on, as a user names it: a text of a decoder; pairs of texts, or speech,
of an encoder-decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import LrkvError
from ..families import Family
from ..source import Checkpoint
from .example import Example, windows_of
from .material import Load, Material, gather
from .text import BUILT_IN, Text, check_ids, read_texts, window_length, windows


@dataclass(frozen=True)
class MeasuredOn:
    """text: of a decoder; pairs: file of an encoder-decoder that reads text; audio: folder of one
    that reads speech. All None where nothing was named.
    """

    text: Text | None = None
    pairs: str | None = None
    audio: str | None = None

    @property
    def named(self) -> list[str]:
        """Which of the three were."""
        return [name for name, value in vars(self).items() if value is not None]

    def __bool__(self) -> bool:
        return bool(self.named)

    def or_built_in(self, family: Family) -> "MeasuredOn":
        """What was named, else the text that ships here; there is no speech that does."""
        if self or family.speech:
            return self
        if family.encoder is None:
            return MeasuredOn(text=read_texts([BUILT_IN])[0])
        return MeasuredOn(pairs=BUILT_IN)

    def read(self, model: str, family: Family, tokens: int) -> Material:
        """So many tokens of it. Raises LrkvError for what cannot be read, or is not what this
        family reads.
        """
        if family.encoder is None:
            if self.text is None or self.named != ["text"]:
                raise LrkvError(
                    f"{model} has no encoder: it reads plain text",
                    "give --text, and neither --audio nor --pairs",
                )
            return Material(family, tokens, [self.text])
        path, what, option = (
            (self.audio, "speech", "--audio FOLDER")
            if family.speech
            else (self.pairs, "one text and writes another", "--pairs FILE")
        )
        if path is None or len(self.named) > 1:
            raise LrkvError(
                f"{model} is an encoder-decoder, which reads {what}",
                f"give {option}, and nothing else to measure on",
            )
        return gather([path], tokens, family)


def described(material: Material) -> dict[str, str]:
    """Name and sha256 of what was read to measure on."""
    [one] = [*material.texts, *material.corpora]
    return {"name": one.name, "sha256": one.sha256}


def examples_of(
    material: Material,
    checkpoint: Checkpoint,
    load: Load,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Example]:
    """As tensors. load: makes the whole model, where targets are missing. Raises LrkvError."""
    if not material.texts:
        return material.examples(checkpoint, load, progress)
    [text] = material.texts
    return windows_of(text_windows(text, checkpoint, material.tokens))


def text_windows(text: Text, checkpoint: Checkpoint, max_tokens: int) -> Tensor:
    """Windows (N, T) of token ids, spread evenly over a text; a text too short for calibration's
    windows is one shorter window. Raises LrkvError.
    """
    tokenizer = checkpoint.tokenizer()
    length = min(
        window_length(checkpoint.config),
        max_tokens,
        len(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]),
    )
    if length < 2:
        raise LrkvError(
            f"the text {text.name} is empty or too short", "a loss needs at least two tokens"
        )
    found = windows([text], tokenizer, length, max_tokens)
    check_ids(found, checkpoint.config.vocab_size, checkpoint.source)
    return found
