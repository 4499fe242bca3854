"""Retrieval tasks: things hidden in a long text and asked for at its end. They are those of RULER
(Hsieh et al. 2024, arXiv 2404.06654) in words of our own, and are made here: no data set is needed.

    single    a number under one key, alone in its text            (RULER: single NIAH)
    keys      four numbers, each under a key of its own             (multi-key)
    words     the same with words in place of numbers
    uuids     the same with UUIDs as keys and values                (multi-key, its hardest)
    values    four numbers under one key, asked for together        (multi-value)
    queries   four numbers under four keys, asked for together      (multi-query)
    copy      a passage that stands at its depth and begins again at the end (induction)

What hides them is prose, or filler that says nothing. Needles lie at even depths between sentences.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TASKS = ("single", "keys", "words", "uuids", "values", "queries", "copy")
HAYSTACKS = ("prose", "filler")
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
KEYS = ("harbour", "orchard", "lantern", "compass", "meadow", "chimney", "saddle", "velvet")
WORDS = (
    *("garden", "window", "silver", "butter", "winter", "castle", "pocket", "summer", "doctor"),
    *("yellow", "letter", "island", "button", "forest", "engine", "mirror", "basket", "candle"),
)
NEEDLES = 4
# depths of a single needle, text after text
DEPTHS = (0.1, 0.5, 0.9, 0.3, 0.7)
PASSAGE, SHOWN = 48, 12  # tokens of a passage, and how many of them begin it again
MARGIN = 8  # tokens left, as a text is cut differently where needles are put in


@dataclass(frozen=True)
class Asked:
    """One question: ids (T,) of what comes after the text, of the answer (k,), and how deep in the
    text what is asked for lies: 0 its beginning, 1 its end; None where it lies in several places.
    """

    question: Tensor
    answer: Tensor
    depth: float | None


@dataclass(frozen=True)
class Hidden:
    """A text (T,) in which something is hidden, and what is asked of it."""

    text: Tensor
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Plan:
    """What is hidden, before it is: needles in order of their depths, and pairs of question and
    answer in words, with the needle asked for.
    """

    needles: tuple[tuple[str, float], ...]
    asked: tuple[tuple[str, str, int | None], ...]


class Haystacks:
    """Texts to hide things in.

    prose: sentences, read on and on from one text to the next, and again from the first when there
    are no more; None for filler.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prose: str | None):
        self.tokenizer = tokenizer
        sentences = None if prose is None else sentences_of(prose)
        self.sentences = sentences or sentences_of(FILLER)
        self.at = 0

    def plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def begins(self) -> list[int]:
        """What every text begins with, if anything, without an end."""
        ids = self.tokenizer("")["input_ids"]
        return [i for i in ids if i != self.tokenizer.eos_token_id or len(ids) == 1]

    def take(self, tokens: int) -> list[list[int]]:
        """Sentences that fill so many tokens; at least one, cut if it must be."""
        found, room = [], tokens
        while True:
            ids = self.plain(self.sentences[self.at % len(self.sentences)])
            if found and len(ids) > room:
                return found
            self.at += 1
            found.append(ids[: max(1, room)])
            room -= len(found[-1])

    def hide(self, plan: Plan, tokens: int) -> Hidden:
        """A text of about so many tokens with its longest question and answer, never more."""
        needles = [self.plain(needle) for needle, _ in plan.needles]
        asked = [
            (self.plain(question), self.plain(question + answer), needle)
            for question, answer, needle in plan.asked
        ]
        begins = self.begins()
        taken = len(begins) + sum(map(len, needles)) + max(len(both) for _, both, _ in asked)
        sentences = self.take(tokens - taken - MARGIN)
        places = [round(depth * len(sentences)) for _, depth in plan.needles]
        ids = list(begins)
        for i in range(len(sentences) + 1):
            for place, needle in zip(places, needles):
                if place == i:
                    ids += needle
            ids += sentences[i] if i < len(sentences) else []
        depths = [depth for _, depth in plan.needles]
        return Hidden(
            torch.tensor(ids),
            tuple(
                Asked(
                    torch.tensor(question),
                    torch.tensor(both[len(question) :]),
                    None if needle is None else depths[needle],
                )
                for question, both, needle in asked
            ),
        )

    def copied(self, tokens: int, depth: float) -> Hidden:
        """A passage of these texts at its depth, which begins again at the end."""
        passage = list(chain.from_iterable(self.take(2 * PASSAGE)))[:PASSAGE]
        begins, again = self.begins(), self.plain("\n\nOnce more:")
        taken = len(begins) + len(passage) + len(again) + len(passage)
        sentences = self.take(tokens - taken - MARGIN)
        sentences.insert(round(depth * len(sentences)), passage)
        ids = begins + list(chain.from_iterable(sentences))
        shown = min(SHOWN, len(passage) // 2)
        question, answer = again + passage[:shown], passage[shown:]
        return Hidden(
            torch.tensor(ids), (Asked(torch.tensor(question), torch.tensor(answer), depth),)
        )


def sentences_of(prose: str) -> list[str]:
    """Each with the space before it and its full stop."""
    parts = (part.strip() for part in " ".join(prose.split()).split(". "))
    return [f" {part.removesuffix('.')}." for part in parts if part]


def even(count: int) -> list[float]:
    """Depths of so many needles."""
    return [(i + 0.5) / count for i in range(count)]


def numbers(count: int, generator: torch.Generator) -> list[str]:
    """Of four digits, all different."""
    return [str(1000 + i) for i in torch.randperm(9000, generator=generator)[:count].tolist()]


def drawn(names: tuple[str, ...], count: int, generator: torch.Generator) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:count].tolist()]


def uuids(count: int, generator: torch.Generator) -> list[str]:
    draw = lambda: torch.randint(0, 256, (16,), generator=generator).tolist()
    return [str(uuid.UUID(bytes=bytes(draw()), version=4)) for _ in range(count)]


def planned(task: str, sample: int, generator: torch.Generator) -> Plan:
    """What the sample-th text of a task hides. Not of `copy`, which hides what the text says."""
    what = {"words": "word", "uuids": "code"}.get(task, "number")
    one = f"The secret {what} of the {{key}} is"
    needle = lambda key, value: f" {one.format(key=key)} {value}."
    ask = lambda key: f"\n\nWhat is the secret {what} of the {key}? {one.format(key=key)}"
    if task == "single":
        key, value = drawn(KEYS, 1, generator)[0], numbers(1, generator)[0]
        depth = DEPTHS[sample % len(DEPTHS)]
        return Plan(((needle(key, value), depth),), ((ask(key), f" {value}", 0),))
    keys = uuids(NEEDLES, generator) if task == "uuids" else drawn(KEYS, NEEDLES, generator)
    if task == "values":
        keys = keys[:1] * NEEDLES
    if task == "words":
        values = drawn(WORDS, NEEDLES, generator)
    else:
        values = (uuids if task == "uuids" else numbers)(NEEDLES, generator)
    hidden = tuple((needle(k, v), depth) for k, v, depth in zip(keys, values, even(NEEDLES)))
    if task in ("keys", "words", "uuids"):
        return Plan(
            hidden, tuple((ask(k), f" {v}", i) for i, (k, v) in enumerate(zip(keys, values)))
        )
    # together, in the order in which they lie
    of = keys[0] if task == "values" else ", the ".join(keys[:-1]) + f" and the {keys[-1]}"
    question = f"\n\nWhat are the secret numbers of the {of}? They are"
    return Plan(hidden, ((question, f" {', '.join(values[:-1])} and {values[-1]}", None),))


def texts(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    prose: str | None,
    tokens: int,
    samples: int,
    seed: int = 0,
) -> Iterator[Hidden]:
    """So many texts of a task, the same for the same seed. prose: to hide things in, None for
    filler.
    """
    generator = torch.Generator().manual_seed(seed)
    haystacks = Haystacks(tokenizer, prose)
    for sample in range(samples):
        if task == "copy":
            yield haystacks.copied(tokens, DEPTHS[sample % len(DEPTHS)])
        else:
            yield haystacks.hide(planned(task, sample, generator), tokens)


def windows(
    tokenizer: PreTrainedTokenizerBase, prose: str, tokens: int, count: int, seed: int
) -> Iterator[list[int]]:
    """So many training windows of exactly so many tokens: a text of every task in turn, in prose,
    with as many of its questions and answers behind it as there is room for. Raises ValueError
    where there is none.
    """
    if tokens < (least := shortest(tokenizer)):
        raise ValueError(f"what retrieval tasks hide takes {least} tokens, more than {tokens}")
    generator, haystacks = torch.Generator().manual_seed(seed), Haystacks(tokenizer, prose)
    for i in range(count):
        task, sample = TASKS[i % len(TASKS)], i // len(TASKS)
        if task == "copy":
            hidden = haystacks.copied(tokens, DEPTHS[sample % len(DEPTHS)])
        else:
            hidden = haystacks.hide(planned(task, sample, generator), tokens)
        ids = hidden.text.tolist()
        order = torch.randperm(len(hidden.asked), generator=generator).tolist()
        for asked in (hidden.asked[k] for k in order):
            both = [*asked.question.tolist(), *asked.answer.tolist()]
            ids += both if len(ids) + len(both) <= tokens else []
        while len(ids) < tokens:
            ids += list(chain.from_iterable(haystacks.take(tokens - len(ids))))
        yield ids[:tokens]


def shortest(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens below which not every task has a text around what it hides."""
    haystacks, generator = Haystacks(tokenizer, None), torch.Generator().manual_seed(0)
    sizes = [3 * PASSAGE]
    for task in TASKS[:-1]:
        plan = planned(task, 0, generator)
        both = max(len(haystacks.plain(q + a)) for q, a, _ in plan.asked)
        sizes.append(both + sum(len(haystacks.plain(needle)) for needle, _ in plan.needles))
    return max(sizes) + 4 * MARGIN
