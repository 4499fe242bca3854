"""The story of a comparison: models read the same examples side by side; how far each is from the
first, what it caches, and whatever else their kind can be asked.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..examples.example import Example
from ..examples.pairs import Corpus
from ..examples.text import Text
from .load import load_model
from .memory import bytes_by_kind, formula_bytes_by_kind
from .perplexity import Candidate, EncoderStates, Scores, measure
from .reading import Asked, Progress, Reading
from .sources import Sources
from .statistics import by_context, joined, summary
from .windows import Windows

READINGS: dict[type, Callable[..., Reading]] = {Text: Windows, Corpus: Sources}


def compare(
    paths: list[str],
    texts: Sequence[Text] | Sequence[Corpus],
    *,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    progress: Progress = lambda *_: None,
    **asked,
) -> dict:
    """Compare `paths[1:]` with `paths[0]`: decoders on texts, encoder-decoders on corpora of speech
    or pairs. `asked` are the fields of `Asked`. Returns the JSON that docs/compare.md describes.
    Raises LrkvError.
    """
    wanted = Asked(**asked)
    reading, models = READINGS[type(texts[0])](paths, texts, wanted), []
    for path in paths:
        models.append(load_model(path, device, dtype))
        reading.check(path, models[-1], models[0])
    examples = reading.examples(models, progress)
    kinds = (None, *dict.fromkeys(wanted.caches))
    candidates = candidates_of(models, kinds)
    names = [
        {"name": name + (f" + {kind}" if kind else ""), "path": path, "cache": kind}
        for name, path in zip(short_names(paths), paths)
        for kind in kinds
    ]
    for candidate in candidates:
        # a cache that cannot be made is refused here, not after an hour
        candidate.empty(0)
    reading.first([name["name"] for name in names], candidates, progress)
    every = measure_texts(candidates, examples, wanted.batch_size, progress)
    about, more = reading.about()
    described = [{"name": text.name, "sha256": text.sha256} for text in texts]
    rows, base = [], joined([scores[0] for scores in every])
    for i, (name, candidate) in enumerate(zip(names, candidates)):
        own = joined([scores[i] for scores in every]) if i else base
        rows.append(
            {
                **name,
                **summary(base, own),
                "caches": cached(candidate, reading.sample(candidate.cache)),
                "dtype": str(candidate.model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in candidate.model.parameters()),
                "texts": [
                    {"name": text.name, **summary(scores[0], scores[i])}
                    for text, scores in zip(texts, every)
                ],
                "context": by_context(base, own),
            }
        )
    add_shares(rows, reading.named)
    return {
        "kind": reading.kind,
        "texts": [
            {**text, "tokens": scores[0].tokens, **facts}
            for text, scores, facts in zip(described, every, about)
        ],
        "tokens": rows[0]["tokens"],
        **more,
        "device": str(device),
        "models": rows,
        **reading.finish(candidates, rows, progress),
    }


def short_names(paths: list[str]) -> list[str]:
    """As much of the end of each path as it takes for all to differ."""
    paths = [
        os.path.abspath(path).removesuffix(".gguf") if Path(path).exists() else path
        for path in paths
    ]
    longest = max(len(Path(path).parts) for path in paths)
    return next(
        (
            short
            for n in range(1, longest + 1)
            if len(set(short := [str(Path(*Path(path).parts[-n:])) for path in paths]))
            == len(set(paths))
        ),
        paths,
    )


def candidates_of(models: list[PreTrainedModel], kinds: Sequence[str | None]) -> list[Candidate]:
    """Every model with every kind of cache. Where an encoder is that of the first model, and a
    conversion leaves it so, its states are the same ones.
    """
    base, found = EncoderStates(models[0]), []
    for model in models:
        states = base if same_encoder(model, models[0]) else EncoderStates(model)
        found += [Candidate(model, kind, states) for kind in kinds]
    return found


def same_encoder(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    if not one.config.is_encoder_decoder:
        return one is other
    a, b = one.get_encoder().state_dict(), other.get_encoder().state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def measure_texts(
    candidates: list[Candidate],
    examples: list[list[Example]],
    batch_size: int,
    progress: Progress,
) -> list[list[Scores]]:
    """For every text, given as its examples, the scores of all candidates."""
    found, before, total = [], 0, sum(map(len, examples))
    for part in examples:
        done = lambda n, _, before=before: progress("measuring", before + n, total)
        found.append(measure(candidates, part, batch_size, done))
        before += len(part)
    return found


def cached(candidate: Candidate, example: Example) -> dict[str, dict[str, float]]:
    """Of each kind of attention, bytes by the formula and bytes counted in a live cache: of
    self-attention per token, of cross-attention per position of the encoder. A quantised cache has
    no formula, its scales depend on its backend, and neither has a family that is not known here:
    then both are what was counted.
    """
    counts = {"self": example.tokens}
    if example.source:
        counts["cross"] = candidate.encoder.of(example).shape[1]
    model, formula = candidate.model, None
    if candidate.cache is None:
        formula = formula_bytes_by_kind(model.config, model.dtype.itemsize)
    found = {}
    for kind, held in bytes_by_kind(candidate.left_by(example)).items():
        allocated = held / counts[kind]
        found[kind] = {"bytes": formula[kind] if formula else allocated, "allocated": allocated}
    return found


def add_shares(rows: list[dict], named: dict[str, tuple[str, str, str]]) -> None:
    """Add to what rows say of their caches the share of the first row's, and all of it once more
    under the names that records and cards have had from the beginning (`Reading.named`).
    """
    for row in rows:
        for kind, cache in row["caches"].items():
            cache["ratio"] = cache["bytes"] / rows[0]["caches"][kind]["bytes"]
            row |= zip(named[kind], (cache[n] for n in ("bytes", "allocated", "ratio")))
