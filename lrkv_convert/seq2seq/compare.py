"""The story of a comparison of encoder-decoders: models read the same speech or texts; what each
thinks of the targets, what it caches, what it writes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import LrkvError
from ..evaluate.compare import joined, short_names
from ..evaluate.load import load_model, load_tokenizer, location, read_config
from ..evaluate.memory import cache_bytes, formula_bytes_by_kind
from ..evaluate.perplexity import Scores, divergence, prediction
from ..evaluate.statistics import summary
from ..evaluate.words import Alignment, align
from ..examples.pairs import read_pairs
from ..examples.prepare import Tensors, prepare
from ..examples.reader import Reader
from ..examples.speech import read_speech
from ..examples.writing import encode, heard, write
from ..families import Family, family_named
from ..modeling import auto_class
from ..modeling.contract_lrkv import CACHE

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def compare(
    paths: list[str],
    audio: Sequence[str] = (),
    pairs: Sequence[str] = (),
    *,
    max_tokens: int | None = None,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    progress: Progress = lambda *_: None,
) -> dict:
    """Compare `paths[1:]` with `paths[0]` on folders of speech or files of pairs. Returns the JSON
    the README describes. Raises LrkvError.

    max_tokens: read about as many of each corpus at most. Perplexity, KL and top-1 are of the
    targets, the prompt left out: those given or, where none is, what the first model writes itself.
    Words are those that each model writes greedily, beside the first model's and beside the
    references.
    """
    families = [family_with_encoder(path) for path in paths]
    family = families[0]
    if bool(audio) != family.speech or bool(pairs) == family.speech:
        kind, option = ("speech", "--audio FOLDER") if family.speech else ("text", "--pairs FILE")
        raise LrkvError(
            f"{paths[0]} reads {kind}", f"give {option}, and nothing else to measure on"
        )
    corpora = [read_speech(folder) for folder in audio] + [read_pairs(file) for file in pairs]
    models = [
        load_model(path, device, dtype, auto_class(each.model_type))
        for path, each in zip(paths, families)
    ]
    check_vocabularies(paths, models)
    reader, base = (
        Reader(
            Path(location(paths[0])[0]),
            family,
            load_tokenizer(paths[0]),
            models[0].config,
            models[0].generation_config,
        ),
        models[0],
    )
    parts = [
        prepare(
            [corpus],
            reader,
            max_tokens,
            lambda: base,
            lambda done, total: progress("writing", done, total),
        )
        for corpus in corpora
    ]
    states, wrote = encode_all(models, reader, parts, progress), []
    every = measure_all(models, states, parts, progress)
    for i, (model, own) in enumerate(zip(models, states)):
        wrote.append(
            write_all(
                model,
                reader,
                own,
                parts,
                lambda done, total: progress(f"model {i + 1}", done, total),
            )
        )
    references = [reference for part in parts for reference in part.references]
    rows, first = [], joined([scores[0] for scores in every])
    for i, (name, path, model) in enumerate(zip(short_names(paths), paths, models)):
        own = joined([scores[i] for scores in every]) if i else first
        rows.append(
            {
                "name": name,
                "path": path,
                "cache": None,
                **summary(first, own),
                **cached(model, states[i][0], parts[0].sequences[0]),
                **words_of(wrote[0], wrote[i], references),
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in model.parameters()),
                "texts": [
                    {"name": corpus.name, **summary(scores[0], scores[i])}
                    for corpus, scores in zip(corpora, every)
                ],
                "written": wrote[i],
            }
        )
    for row in rows:
        for kind in ("self", "cross"):
            row[f"{kind}_ratio"] = row[f"{kind}_bytes"] / rows[0][f"{kind}_bytes"]
    return {
        "kind": "speech" if family.speech else "text",
        "texts": [
            {
                "name": corpus.name,
                "sha256": corpus.sha256,
                "examples": len(part.sources),
                "tokens": scores[0].tokens,
                "targets_by_the_first_model": part.written,
            }
            for corpus, part, scores in zip(corpora, parts, every)
        ],
        "tokens": rows[0]["tokens"],
        "examples": sum(len(part.sources) for part in parts),
        "device": str(device),
        "names": [name for part in parts for name in part.names],
        "references": references,
        "models": rows,
    }


def family_with_encoder(path: str) -> Family:
    """The family of a model, original or converted. Raises LrkvError for one without an encoder."""
    family = family_named(read_config(path).model_type)
    if family is None or family.encoder is None:
        raise LrkvError(
            f"{path} has no encoder: it reads plain text",
            "give --text, and neither --audio nor --pairs",
        )
    family.refuse(read_config(path))
    return family


def check_vocabularies(paths: list[str], models: list[PreTrainedModel]) -> None:
    for path, model in zip(paths, models):
        if (
            model.config.vocab_size != models[0].config.vocab_size
            or model.main_input_name != models[0].main_input_name
        ):
            raise LrkvError(
                f"{path} reads or writes other things than the first model",
                "compare a converted model with its own original",
            )


def encode_all(
    models: list[PreTrainedModel], reader: Reader, parts: list[Tensors], progress: Progress
) -> list[list[Tensor]]:
    """The encoder's states of every source, for every model; where an encoder is the first model's,
    and a conversion leaves it so, the same ones.
    """
    sources, found = [source for part in parts for source in part.sources], []
    for i, model in enumerate(models):
        found.append(
            found[0]
            if i and same_weights(model.get_encoder(), models[0].get_encoder())
            else encode(model, reader, sources)
        )
        progress("encoding", i + 1, len(models))
    return found


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@torch.no_grad()
def measure_all(
    models: list[PreTrainedModel],
    states: list[list[Tensor]],
    parts: list[Tensors],
    progress: Progress,
) -> list[list[Scores]]:
    """For every corpus the scores of all models on its targets. states: of all sources, for every
    model.
    """
    found, done, total = [], 0, sum(len(part.sources) for part in parts)
    for part in parts:
        scores = [Scores() for _ in models]
        for sequence, given in zip(part.sequences, part.given):
            base = None
            for model, own, score in zip(models, states, scores):
                logits = model(
                    **heard([own[done]]),
                    decoder_input_ids=sequence[:-1].unsqueeze(0).to(model.device),
                    use_cache=False,
                ).logits[0, given - 1 :]
                nll, mass, top = prediction(logits, sequence[given:].to(logits.device))
                base = base or (logits, mass, top)
                score.nll.append(nll.cpu())
                score.kl.append(
                    (
                        torch.zeros_like(nll)
                        if base[0] is logits
                        else divergence(*base[:2], logits, mass)
                    ).cpu()
                )
                score.agree.append((top == base[2].to(top.device)).float().cpu())
            progress("measuring", done := done + 1, total)
        found.append(scores)
    return found


def write_all(
    model: PreTrainedModel,
    reader: Reader,
    states: list[Tensor],
    parts: list[Tensors],
    progress: Callable[[int, int], None],
) -> list[str]:
    """What a model writes for every source, greedily, from the prompts of the targets."""
    prompts = [
        sequence[:given].tolist()
        for part in parts
        for sequence, given in zip(part.sequences, part.given)
    ]
    return [reader.words(sequence) for sequence in write(model, reader, states, prompts, progress)]


def words_of(base: list[str], own: list[str], references: list[str | None]) -> dict:
    """Shares of words that are as the first model wrote them, and the word error rate against the
    references, None without any.
    """
    none = Alignment(0, 0, 0, 0)
    same = sum((align(a, b) for a, b in zip(base, own)), none)
    wrong = sum(
        (
            align(reference, text)
            for reference, text in zip(references, own)
            if reference is not None
        ),
        none,
    )
    return {
        "words": same.first,
        "same_words": same.same_share,
        "word_error_rate": wrong.error_rate,
        "same_texts": sum(align(a, b).edits == 0 for a, b in zip(base, own)) / len(base),
    }


@torch.no_grad()
def cached(model: PreTrainedModel, state: Tensor, sequence: Tensor) -> dict[str, float]:
    """Bytes of self-attention per decoded token and of cross-attention per encoder position: by the
    formula, and counted on a live cache.
    """
    ids, formula = (
        sequence[:-1].unsqueeze(0).to(model.device),
        formula_bytes_by_kind(model.config, model.dtype.itemsize),
    )
    caches = model(**heard([state]), decoder_input_ids=ids, use_cache=True)[CACHE]
    counts = {
        "self": (caches.self_attention_cache, ids.shape[1]),
        "cross": (caches.cross_attention_cache, state.shape[1]),
    }
    return {f"{kind}_bytes": formula[kind] for kind in formula} | {
        f"{kind}_bytes_allocated": cache_bytes(cache) / n for kind, (cache, n) in counts.items()
    }
