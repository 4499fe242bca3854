"""What models are compared on: what one kind of model reads, and what more can be asked of it.

windows.py   texts in windows, of decoders: quantised caches, passkeys, retrieval, tasks,
             continuations
sources.py   speech or pairs of texts, of encoder-decoders: what each writes, word by word
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import PreTrainedModel

from ..examples.example import Example
from .perplexity import Candidate

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Asked:
    """What a comparison can be asked for.

    caches: quantised caches (caches.CACHES), each a row more for every model; seq_len: window in
    tokens; max_tokens: read no more of each text than this, of pairs about as many; batch_size:
    windows per forward pass; prompts, samples: beginnings to go on from, and how many more to take
    from the first text; long_context: tokens (0: as many as the models can read) for the passkey
    task at a quarter, half and all of them and for the loss by position; retrieval: lengths in
    tokens at which retrieval tasks are asked, so many texts of each; tasks: of lm-eval, with its
    limit, a folder of one's own, and whether tasks may run generated code.
    """

    caches: Sequence[str] = field(default=(), metadata={"option": "--cache"})
    seq_len: int = 512
    max_tokens: int | None = None
    batch_size: int = 1
    prompts: Sequence[str] = field(default=(), metadata={"option": "--prompt"})
    samples: int = 0
    long_context: int | None = None
    retrieval: Sequence[int] = ()
    retrieval_texts: int = 5
    tasks: Sequence[str] = ()
    limit: int | None = None
    task_folder: Path | None = None
    generated_code: bool = field(default=False, metadata={"option": "--run-generated-code"})

    def others(self, taken: Sequence[str]) -> list[str]:
        """The options that are not as by default, but for those taken."""
        return [
            each.metadata.get("option", "--" + each.name.replace("_", "-"))
            for each in fields(self)
            if each.name not in taken and getattr(self, each.name) not in (each.default, [])
        ]


class Reading(ABC):
    """What is read, and what a comparison on it says beside losses and bytes."""

    kind: str  # "windows", "text" or "speech"
    # by kind of attention: what a row calls bytes by the formula, bytes counted, share of the base
    named: dict[str, tuple[str, str, str]]

    @abstractmethod
    def check(self, path: str, model: PreTrainedModel, base: PreTrainedModel) -> None:
        """Raise LrkvError for a model that cannot read this, or not what the base reads."""

    @abstractmethod
    def examples(self, models: list[PreTrainedModel], progress: Progress) -> list[list[Example]]:
        """Of every text. Raises LrkvError."""

    @abstractmethod
    def sample(self, cache: str | None) -> Example:
        """What is read to count a cache."""

    def first(  # noqa: B027  (most have nothing to do there)
        self, names: list[str], candidates: list[Candidate], progress: Progress
    ) -> None:
        """What can go wrong and so is done before anything is measured. Raises LrkvError."""

    @abstractmethod
    def about(self) -> tuple[list[dict], dict]:
        """What the result says of each text and of all that is read."""

    @abstractmethod
    def finish(self, candidates: list[Candidate], rows: list[dict], progress: Progress) -> dict:
        """What more the result says; rows: of the candidates, added to."""
