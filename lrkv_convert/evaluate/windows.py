"""Texts in windows, which decoders read, and what more they are asked: to read from quantised
caches, to find what lies far back, tasks, and to go on from a beginning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LrkvError
from ..examples.example import Example, window
from ..examples.retrieval import shortest as needed
from ..examples.text import Text, check_ids
from .caches import PIECE, check_caches
from .load import load_tokenizer, read_config, refuse_encoder
from .longcontext import passkeys, shortest
from .perplexity import Candidate, measure, text_windows
from .positions import positions, positions_exceeded
from .reading import Asked, Progress, Reading
from .retrieval import retrieval
from .samples import WRITTEN, continuation, passages
from .statistics import by_context
from .tasks import run_tasks, task_manager

COUNTED = 16  # tokens read to count what a cache holds


class Windows(Reading):
    """Texts, read in windows that do not overlap. Raises LrkvError for what cannot be asked."""

    kind = "windows"
    named = {"self": ("kv_bytes_per_token", "kv_bytes_per_token_allocated", "kv_ratio")}

    def __init__(self, paths: list[str], texts: Sequence[Text], asked: Asked):
        check_caches(list(asked.caches))
        if asked.caches and asked.seq_len <= PIECE:
            raise LrkvError(
                f"in windows of {asked.seq_len} tokens nothing is read back from a quantised cache",
                f"give --seq-len of more than {PIECE}",
            )
        self.manager = task_manager(list(asked.tasks), asked.task_folder) if asked.tasks else None
        for path in paths:
            refuse_encoder(path, read_config(path))
        self.tokenizer = load_tokenizer(paths[0])
        self.paths, self.texts, self.asked = paths, texts, asked
        self.ids = [tokens_of(text, self.tokenizer, asked.max_tokens) for text in texts]
        self.far: int | None = None  # tokens of the long-context check
        self.tasks: list[dict] = []

    def check(self, path, model, base):
        if limit := positions_exceeded(model.config, self.asked.seq_len):
            raise LrkvError(
                f"windows of {self.asked.seq_len} tokens are longer than {path} can read ({limit})",
                "give a smaller --seq-len",
            )
        if model.config.vocab_size != base.config.vocab_size:
            raise LrkvError(
                f"{path} has another vocabulary than the first model",
                "compare a converted model with its own original",
            )

    def examples(self, models, progress):
        check_ids(torch.cat(self.ids), rows_of(models[0]), self.paths[0])
        self.far = check_long_context(self.asked.long_context, models, self.ids, self.tokenizer)
        check_retrieval(self.asked.retrieval, models, self.tokenizer)
        check_prompts(self.asked.prompts, self.tokenizer, models)
        if self.asked.samples > len(self.ids[0]):
            raise LrkvError(
                f"{self.asked.samples:,} passages are more than the {len(self.ids[0]):,} tokens of"
                f" {self.texts[0].name} have",
                "give fewer --samples",
            )
        return [text_windows(ids, self.asked.seq_len) for ids in self.ids]

    def sample(self, cache):
        length = self.asked.seq_len if cache else min(COUNTED, self.asked.seq_len)
        return window(torch.zeros(length, dtype=torch.long))

    def first(self, names, candidates, progress):
        exact = [(n, c.model) for n, c in zip(names, candidates) if c.cache is None]
        for i, (name, model) in enumerate(exact if self.manager else []):
            progress("tasks", i, len(exact))
            found = run_tasks(
                model,
                self.tokenizer,
                list(self.asked.tasks),
                self.manager,
                limit=self.asked.limit,
                batch_size=self.asked.batch_size,
                generated_code=self.asked.generated_code,
            )
            self.tasks += [{"name": name, **row} for row in found]

    def about(self):
        return [{} for _ in self.texts], {"seq_len": self.asked.seq_len, "bos": "none"}

    def finish(self, candidates, rows, progress):
        found = {}
        if self.asked.prompts or self.asked.samples:
            taken = passages(self.ids[0], self.asked.samples, self.tokenizer)
            found["samples"] = [
                {
                    "prompt": prompt,
                    "continuations": [continuation(c, self.tokenizer, prompt) for c in candidates],
                }
                for prompt in (*self.asked.prompts, *taken)
            ]
        if self.far:
            found["long_context"] = self.read_far(candidates, rows, self.far, progress)
        if self.asked.retrieval:
            found["retrieval"] = self.read_retrieval(candidates, rows, progress)
        return found | ({"tasks": self.tasks} if self.manager else {})

    def read_retrieval(
        self, candidates: list[Candidate], rows: list[dict], progress: Progress
    ) -> dict:
        """Retrieval tasks, in the first text and in filler."""
        found = retrieval(
            candidates,
            self.tokenizer,
            sorted(set(self.asked.retrieval)),
            self.texts[0].content,
            self.asked.retrieval_texts,
            lambda *state: progress("retrieval", *state),
        )
        return {
            "prose": self.texts[0].name,
            "texts": self.asked.retrieval_texts,
            "models": [
                {**{name: row[name] for name in ("name", "path", "cache")}, "tasks": own}
                for row, own in zip(rows, found)
            ],
        }

    def read_far(
        self, candidates: list[Candidate], rows: list[dict], length: int, progress: Progress
    ) -> dict:
        """The passkey task, and loss and divergence by position in windows of `length` tokens of
        all texts.
        """
        whole: list[Example] = []
        for ids in self.ids:
            whole += text_windows(ids[: len(ids) // length * length], length)
        scores = measure(candidates, whole, 1, lambda *state: progress("far", *state))
        least = shortest(self.tokenizer)
        lengths = [part for part in sorted({length // n for n in (4, 2, 1)}) if part >= least]
        keys = passkeys(
            candidates, self.tokenizer, lengths, lambda *state: progress("passkey", *state)
        )
        return {
            "tokens": length,
            "windows": len(scores[0].nll),
            "models": [
                {
                    **{name: row[name] for name in ("name", "path", "cache")},
                    "context": by_context(scores[0], own),
                    "passkey": found,
                }
                for row, own, found in zip(rows, scores, keys)
            ],
        }


def tokens_of(text: Text, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Tensor:
    """Ids (n,), at least two. Raises LrkvError."""
    ids = torch.tensor(
        tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"],
        dtype=torch.long,
    )[:max_tokens][: text.max_tokens]
    if len(ids) < 2:
        raise LrkvError(
            f"the text {text.name} is empty or too short", "perplexity needs at least two tokens"
        )
    return ids


def rows_of(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def limits_of(models: list[PreTrainedModel]) -> list[int]:
    """How many tokens the models can read, as far as they say so."""
    return [n for model in models if (n := positions(model.config)) is not None]


def check_long_context(
    asked: int | None,
    models: list[PreTrainedModel],
    ids: list[Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Tokens of the long-context check, None without one. Raises LrkvError for more than the models
    can read.
    """
    limits = limits_of(models)
    if asked is None:
        return None
    if asked == 0 and not limits:
        raise LrkvError(
            "the models do not say how many tokens they can read", "give --long-context a number"
        )
    if limits and asked > min(limits):
        raise LrkvError(
            f"{asked} tokens are more than the models can read ({min(limits)})",
            "give a smaller --long-context",
        )
    length = asked or min(limits)
    if length < (least := shortest(tokenizer)):
        raise LrkvError(
            f"a passkey and its question take {least} tokens, more than {length}",
            "give a larger --long-context",
        )
    if not any(len(text) >= length for text in ids):
        raise LrkvError(
            f"no text fills one window of {length:,} tokens",
            "give a longer text, or a smaller --long-context",
        )
    return length


def check_retrieval(
    lengths: Sequence[int], models: list[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise LrkvError for lengths at which retrieval tasks cannot be asked."""
    if not lengths:
        return
    limit, least = min(limits_of(models), default=None), needed(tokenizer)
    if limit is not None and max(lengths) > limit:
        raise LrkvError(
            f"{max(lengths)} tokens are more than the models can read ({limit})",
            "give a smaller --retrieval",
        )
    if min(lengths) < least:
        raise LrkvError(
            f"what retrieval tasks hide takes {least} tokens, more than {min(lengths)}",
            "give a larger --retrieval",
        )


def check_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, models: list[PreTrainedModel]
) -> None:
    """Raise LrkvError for a beginning that is none, or that leaves no room to go on."""
    limit = min(limits_of(models), default=None)
    for prompt in prompts:
        given = tokenizer(prompt)["input_ids"]
        if not (length := len(given)):
            raise LrkvError("an empty --prompt is no beginning", "write a word or two")
        check_ids(torch.tensor(given), rows_of(models[0]), models[0].name_or_path)
        if limit is not None and length + WRITTEN > limit:
            raise LrkvError(
                f"a --prompt of {length} tokens leaves no room for {WRITTEN} more in the {limit}"
                " the models read",
                "give a shorter one",
            )
