"""Corpora -> sources and targets as tensors, for calibration and for comparison; what no one has
written, the model writes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import LrkvError
from .example import Example, pair, reads
from .pairs import Corpus, spread
from .reader import Reader
from .text import check_ids
from .writing import encode, write


@dataclass(frozen=True)
class Tensors:
    """Sources as the encoder takes them; sequences (T + 1,) of the decoder: it reads all but the
    last and predicts all but the first `given`; references: what was said to be written, None where
    nobody has; written: how many sequences the model wrote itself.
    """

    names: list[str]
    sources: list[Tensor]
    sequences: list[Tensor]
    given: list[int]
    references: list[str | None]
    written: int

    @property
    def tokens(self) -> int:
        """That the decoder reads."""
        return sum(len(sequence) - 1 for sequence in self.sequences)

    def examples(self) -> list[Example]:
        """As a decoder's windows come."""
        return [
            pair(source, sequence, given)
            for source, sequence, given in zip(self.sources, self.sequences, self.given)
        ]


def prepare(
    corpora: list[Corpus],
    reader: Reader,
    tokens: int | None,
    model: Callable[[], PreTrainedModel],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Tensors:
    """An equal share of every corpus, spread evenly over it, `tokens` in all or, with None,
    everything. model: makes the model where it must write or say what language it hears. Raises
    LrkvError for what the model cannot read.
    """
    examples = []
    for corpus in corpora:
        parts = [part for example in corpus.examples for part in reader.fitting(example)]
        examples += (
            parts
            if tokens is None
            else [
                parts[n]
                for n in spread([reader.size(part) for part in parts], tokens // len(corpora))
            ]
        )
    sources, missing = (
        [reader.source(example) for example in examples],
        [n for n, example in enumerate(examples) if example.target is None],
    )
    if not reader.family.speech:
        check_ids(
            torch.cat([source.flatten() for source in sources]),
            reader.config.vocab_size,
            "the encoder-decoder",
        )
    writer = model() if missing or reader.multilingual else None
    prompts = reader.prompts(sources, writer)
    told = [
        None if example.target is None else reader.target(example.target, prompt)
        for example, prompt in zip(examples, prompts)
    ]
    if missing:
        assert writer is not None
        own = write(
            writer,
            reader,
            [encode(writer, reads(sources[n])) for n in missing],
            [prompts[n] for n in missing],
            progress,
        )
        for n, sequence in zip(missing, own):
            told[n] = sequence
    sequences = [sequence for sequence in told if sequence is not None]  # all of them by now
    for example, sequence in zip(examples, sequences):
        if len(sequence) - 1 > reader.longest_target:
            raise LrkvError(
                f"the target of {example.name} has {len(sequence):,} tokens, more than the"
                f" {reader.longest_target:,} the model writes",
                "cut it into parts",
            )
    # a model may write nothing at all
    kept = [
        n
        for n, (sequence, prompt) in enumerate(zip(sequences, prompts))
        if len(sequence) > len(prompt)
    ]
    if not kept:
        raise LrkvError("nothing was written for any of these sources", "give targets")
    every = lambda values: [values[n] for n in kept]
    return Tensors(
        every([example.name for example in examples]),
        every(sources),
        every(sequences),
        every(list(map(len, prompts))),
        every([example.target for example in examples]),
        len(set(missing) & set(kept)),
    )
