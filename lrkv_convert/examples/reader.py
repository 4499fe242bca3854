"""From examples to what the model takes and gives, by the checkpoint's own feature extractor and
tokenizer, and back to words.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import LrkvError, first_line
from ..families import Family
from .pairs import Pair
from .speech import RATE, TOKENS_PER_SECOND
from .text import window_length

# the last word of a speech model's prompt: text follows, and no times
NO_TIMESTAMPS = "<|notimestamps|>"


class Reader:
    """folder: with tokenizer and, for speech, preprocessor_config.json; tokenizer, config,
    generation_config: the model's. Raises LrkvError without a feature extractor.
    """

    generation_config: Any  # speech models give theirs more fields
    extractor: Any  # None for text

    def __init__(
        self,
        folder: Path,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        config,
        generation_config: GenerationConfig,
    ):
        self.family, self.tokenizer, self.config, self.generation_config = (
            family,
            tokenizer,
            config,
            generation_config,
        )
        self.extractor = _extractor(folder) if family.speech else None

    @property
    def start(self) -> list[int]:
        """What the decoder is given to begin with, the language left out."""
        first = [
            (
                self.generation_config.decoder_start_token_id
                if self.generation_config.decoder_start_token_id is not None
                else self.config.decoder_start_token_id
            )
        ]
        return first + (
            [self._special(NO_TIMESTAMPS)]
            if self.family.speech and self._special(NO_TIMESTAMPS) is not None
            else []
        )

    @property
    def multilingual(self) -> bool:
        """Whether a prompt names the language that is spoken."""
        return self.family.speech and bool(getattr(self.generation_config, "lang_to_id", None))

    @torch.no_grad()
    def prompts(self, sources: list[Tensor], model: PreTrainedModel | None) -> list[list[int]]:
        """What the decoder is given before it writes, for every source. A multilingual speech model
        (which must be given) says itself what it hears.
        """
        if not self.multilingual:
            return [self.start] * len(sources)
        first, *rest = self.start
        task = [self.generation_config.task_to_id["transcribe"]]
        heard: Any = model
        languages = [
            heard.detect_language(input_features=source.to(heard.device, heard.dtype))[0].item()
            for source in sources
        ]
        return [[first, language, *task, *rest] for language in languages]

    def _special(self, token: str) -> int | None:
        found = cast(int | None, self.tokenizer.convert_tokens_to_ids(token))
        return None if found is None or found == self.tokenizer.unk_token_id else found

    @property
    def ends(self) -> list[int]:
        """Tokens after which nothing comes."""
        ends = (
            self.generation_config.eos_token_id
            if self.generation_config.eos_token_id is not None
            else self.config.eos_token_id
        )
        return ends if isinstance(ends, list) else [ends]

    @property
    def longest_source(self) -> int | None:
        """Tokens of text that the encoder can read; None where nothing says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def longest_target(self) -> int:
        """Tokens that the decoder can hold."""
        return (
            getattr(self.config, "max_target_positions", None)
            or getattr(self.config, "max_position_embeddings", None)
            or window_length(self.config)
        )

    def source(self, example: Pair) -> Tensor:
        """Features (1, bins, frames) of speech, ids (1, S) of a text. Raises LrkvError for what is
        too long, or of the wrong kind.
        """
        if self.family.speech == isinstance(example.source, str):
            raise LrkvError(
                f"this model reads {'speech' if self.family.speech else 'text'}, and {example.name}"
                f" is {'text' if self.family.speech else 'speech'}",
                (
                    "give a folder of .wav files"
                    if self.family.speech
                    else "give texts, or .jsonl pairs"
                ),
            )
        if isinstance(example.source, str):
            ids = torch.tensor(
                [self.tokenizer(example.source, verbose=False)["input_ids"]], dtype=torch.long
            )
            if self.longest_source is not None and ids.shape[1] > self.longest_source:
                raise LrkvError(
                    f"{example.name} has {ids.shape[1]:,} tokens, more than the"
                    f" {self.longest_source:,} the model reads",
                    "cut it into parts",
                )
            return ids
        seconds, limit = len(example.source) / RATE, self.extractor.chunk_length
        if seconds > limit:
            raise LrkvError(
                f"{example.name} is {seconds:.0f} s long, and the model hears {limit} s at a time",
                "cut it where nobody speaks",
            )
        return self.extractor(
            example.source.numpy(), sampling_rate=RATE, return_tensors="pt"
        ).input_features

    def target(self, text: str, prompt: list[int]) -> Tensor:
        """The sequence (T + 1,) of a decoder that writes this text: the prompt, the text, the
        end.
        """
        if self.family.speech:
            ids = self.tokenizer(" " + text.strip(), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        else:
            ids = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        ids = ids if ids and ids[-1] in self.ends else [*ids, self.ends[0]]
        return torch.tensor([*prompt, *ids], dtype=torch.long)

    def words(self, target: Tensor) -> str:
        """What a sequence says."""
        said = cast(str, self.tokenizer.decode(target, skip_special_tokens=True))
        return " ".join(said.split())

    def size(self, example: Pair) -> int:
        """About how many tokens an example counts for: of speech those of what is said, of text
        those of the source.
        """
        if self.family.speech:
            return (
                len(self.tokenizer(example.target)["input_ids"])
                if example.target
                else int(TOKENS_PER_SECOND * len(example.source) / RATE)
            )
        return len(self.tokenizer(_text(example), verbose=False)["input_ids"])

    def fitting(self, example: Pair) -> list[Pair]:
        """The example, or as many parts of a text without a target as its length asks for."""
        # a token or two are added around it
        limit = (
            min(window_length(self.config), self.longest_source or window_length(self.config)) - 2
        )
        if self.family.speech or example.target is not None or self.size(example) <= limit:
            return [example]
        ids = self.tokenizer(_text(example), add_special_tokens=False, verbose=False)["input_ids"]
        return [
            Pair(
                f"{example.name}.{i}", cast(str, self.tokenizer.decode(ids[start : start + limit]))
            )
            for i, start in enumerate(range(0, len(ids), limit), 1)
        ]


def _text(example: Pair) -> str:
    """The source of an example that is no speech."""
    return cast(str, example.source)


def _extractor(folder: Path):
    try:
        return AutoFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise LrkvError(
            f"{folder} has no feature extractor that loads: {first_line(error)}",
            "put preprocessor_config.json beside the weights",
        ) from error
