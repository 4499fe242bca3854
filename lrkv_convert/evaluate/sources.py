"""Speech or pairs of texts, which encoder-decoders read: losses are of the targets, and what each
model writes by itself is held against the first one's writing and the references.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import LrkvError
from ..examples.example import Example
from ..examples.pairs import Corpus
from ..examples.prepare import Tensors, prepare
from ..examples.reader import Reader
from ..examples.writing import write
from .load import family_with_encoder, load_tokenizer, location
from .perplexity import Candidate
from .reading import Asked, Reading
from .words import Alignment, align

TAKEN = ("max_tokens",)  # of what can be asked


class Sources(Reading):
    """Folders of speech or files of pairs. Where no target is given, it is what the first model
    writes. Raises LrkvError for what does not go with them.
    """

    reader: Reader
    named = {
        kind: (f"{kind}_bytes", f"{kind}_bytes_allocated", f"{kind}_ratio")
        for kind in ("self", "cross")
    }

    def __init__(self, paths: list[str], texts: Sequence[Corpus], asked: Asked):
        if others := asked.others(TAKEN):
            raise LrkvError(f"{others[0]} does not go with --audio and --pairs", "leave it out")
        self.family, *_ = [family_with_encoder(path) for path in paths]
        self.kind = "speech" if self.family.speech else "text"
        self.paths, self.texts, self.asked = paths, texts, asked
        self.parts: list[Tensors] = []  # of every corpus
        self.every: list[Example] = []

    def check(self, path, model, base):
        if (
            model.config.vocab_size != base.config.vocab_size
            or model.main_input_name != base.main_input_name
        ):
            raise LrkvError(
                f"{path} reads or writes other things than the first model",
                "compare a converted model with its own original",
            )

    def examples(self, models, progress):
        base = models[0]
        self.reader = Reader(
            Path(location(self.paths[0])[0]),
            self.family,
            load_tokenizer(self.paths[0]),
            base.config,
            base.generation_config,
        )
        writing = lambda *state: progress("writing", *state)
        self.parts = [
            prepare([corpus], self.reader, self.asked.max_tokens, lambda: base, writing)
            for corpus in self.texts
        ]
        found = [part.examples() for part in self.parts]
        self.every = [example for part in found for example in part]
        return found

    def sample(self, cache):
        return self.every[0]

    def about(self):
        texts = [
            {"examples": len(part.sources), "targets_by_the_first_model": part.written}
            for part in self.parts
        ]
        return texts, {"examples": len(self.every)}

    def finish(self, candidates, rows, progress):
        references = [reference for part in self.parts for reference in part.references]
        wrote: list[list[str]] = []
        for i, (candidate, row) in enumerate(zip(candidates, rows), 1):
            done = lambda *state, stage=f"model {i}": progress(stage, *state)
            wrote.append(self.written(candidate, done))
            row |= words_of(wrote[0], wrote[-1], references) | {"written": wrote[-1]}
        names = [name for part in self.parts for name in part.names]
        return {"names": names, "references": references}

    def written(self, candidate: Candidate, progress: Callable[[int, int], None]) -> list[str]:
        """What a model writes for every source, greedily, from the prompts of the targets."""
        prompts = [
            sequence[:given].tolist()
            for part in self.parts
            for sequence, given in zip(part.sequences, part.given)
        ]
        states = [candidate.encoder.of(example) for example in self.every]
        found = write(candidate.model, self.reader, states, prompts, progress)
        return [self.reader.words(sequence) for sequence in found]


def words_of(base: list[str], own: list[str], references: list[str | None]) -> dict:
    """Shares of words that are as the first model wrote them, and the word error rate against the
    references, None without any.
    """
    none = Alignment(0, 0, 0, 0)
    same = sum((align(a, b) for a, b in zip(base, own)), none)
    judged = [(reference, b) for reference, b in zip(references, own) if reference is not None]
    wrong = sum((align(reference, b) for reference, b in judged), none)
    return {
        "words": same.first,
        "same_words": same.same_share,
        "word_error_rate": wrong.error_rate,
        "same_texts": sum(align(a, b).edits == 0 for a, b in zip(base, own)) / len(base),
    }
