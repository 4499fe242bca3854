"""The story of a comparison: models read the same texts side by side; how far each is from the
first, what it caches, what it writes.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LrkvError
from ..examples.text import Text, check_ids
from .caches import PIECE, check_caches
from .load import load_model, load_tokenizer
from .longcontext import passkeys, shortest
from .memory import allocated_bytes, cache_bytes, formula_bytes
from .perplexity import Candidate, Scores, measure, text_windows
from .samples import WRITTEN, continuation, passages
from .statistics import by_context, summary
from .tasks import run_tasks, task_manager

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def compare(
    paths: list[str],
    texts: list[Text],
    *,
    caches: Sequence[str] = (),
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 1,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    prompts: Sequence[str] = (),
    samples: int = 0,
    long_context: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    task_folder: Path | None = None,
    generated_code: bool = False,
    progress: Progress = lambda *_: None,
) -> dict:
    """Compare `paths[1:]` with `paths[0]` on `texts`. Returns the JSON the README describes. Raises
    LrkvError.

    caches: quantised caches (caches.CACHES), each a row more for every model; seq_len: window in
    tokens; max_tokens: read no more of each text than this; batch_size: windows per forward pass;
    prompts, samples: beginnings to go on from, and how many more to take from the first text;
    long_context: tokens (0: as many as the models can read) for the passkey task at a quarter, half
    and all of them and for the loss by position; tasks: of lm-eval, with its limit, a folder of
    one's own, and whether tasks may run generated code.
    """
    check_caches(caches := list(dict.fromkeys(caches)))
    if caches and seq_len <= PIECE:
        raise LrkvError(
            f"in windows of {seq_len} tokens nothing is read back from a quantised cache",
            f"give --seq-len of more than {PIECE}",
        )
    manager = task_manager(tasks, task_folder) if tasks else None
    tokenizer, models = load_tokenizer(paths[0]), []
    ids = [tokens_of(text, tokenizer, max_tokens) for text in texts]
    for path in paths:
        models.append(load_model(path, device, dtype))
        check_model(path, models[-1], models[0], seq_len)
    check_ids(torch.cat(ids), rows_of(models[0]), paths[0])
    length = check_long_context(long_context, models, ids, tokenizer)
    check_prompts(prompts, tokenizer, models)
    if samples > len(ids[0]):
        raise LrkvError(
            f"{samples:,} passages are more than the {len(ids[0]):,} tokens of {texts[0].name}"
            " have",
            "give fewer --samples",
        )
    short, candidates = (
        short_names(paths),
        [Candidate(model, kind) for model in models for kind in (None, *caches)],
    )
    names = [
        {"name": name + (f" + {kind}" if kind else ""), "path": path, "cache": kind}
        for name, path in zip(short, paths)
        for kind in (None, *caches)
    ]
    for candidate in candidates:
        # a cache that cannot be made is refused here, not after an hour
        candidate.empty(0)
    done_tasks = []  # what can go wrong goes first: datasets that are not there
    for i, (name, model) in enumerate(zip(short, models) if tasks else []):
        progress("tasks", i, len(models))
        done_tasks += [
            {"name": name, **row}
            for row in run_tasks(
                model,
                tokenizer,
                tasks,
                manager,
                limit=limit,
                batch_size=batch_size,
                generated_code=generated_code,
            )
        ]
    every = measure_texts(
        candidates, ids, seq_len, batch_size, lambda done, total: progress("measuring", done, total)
    )
    rows, base = [], joined([scores[0] for scores in every])
    for i, (name, candidate) in enumerate(zip(names, candidates)):
        own = joined([scores[i] for scores in every]) if i else base
        rows.append(
            {
                **name,
                **summary(base, own),
                **cached(candidate, seq_len),
                "dtype": str(candidate.model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in candidate.model.parameters()),
                "texts": [
                    {"name": text.name, **summary(scores[0], scores[i])}
                    for text, scores in zip(texts, every)
                ],
                "context": by_context(base, own),
            }
        )
    for row in rows:
        row["kv_ratio"] = row["kv_bytes_per_token"] / rows[0]["kv_bytes_per_token"]
    result = {
        "texts": [
            {"name": text.name, "sha256": text.sha256, "tokens": scores[0].tokens}
            for text, scores in zip(texts, every)
        ],
        "tokens": rows[0]["tokens"],
        "seq_len": seq_len,
        "bos": "none",
        "device": str(device),
        "models": rows,
    }
    if prompts or samples:
        prompts = [*prompts, *passages(ids[0], samples, tokenizer)]
        result["samples"] = [
            {
                "prompt": prompt,
                "continuations": [
                    continuation(candidate, tokenizer, prompt) for candidate in candidates
                ],
            }
            for prompt in prompts
        ]
    if length:
        result["long_context"] = read_far(candidates, names, tokenizer, ids, length, progress)
    return result | ({"tasks": done_tasks} if tasks else {})


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


def check_model(path: str, model: PreTrainedModel, base: PreTrainedModel, seq_len: int) -> None:
    """Raise LrkvError for a model that cannot read such windows, or not what the base reads."""
    if limit := positions_exceeded(model.config, seq_len):
        raise LrkvError(
            f"windows of {seq_len} tokens are longer than {path} can read ({limit})",
            "give a smaller --seq-len",
        )
    if model.config.vocab_size != base.config.vocab_size:
        raise LrkvError(
            f"{path} has another vocabulary than the first model",
            "compare a converted model with its own original",
        )


def positions_exceeded(config, seq_len: int) -> int | None:
    """How many tokens a model with this config can read, where these are more."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if limit is not None and seq_len > limit else None


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read; None where nothing says so."""
    return getattr(model.config, "max_position_embeddings", None)


def rows_of(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    return model.get_input_embeddings().weight.shape[0]


def check_long_context(
    asked: int | None,
    models: list[PreTrainedModel],
    ids: list[Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Tokens of the long-context check, None without one. Raises LrkvError for more than the models
    can read.
    """
    limits = [limit for limit in map(positions, models) if limit is not None]
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


def check_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, models: list[PreTrainedModel]
) -> None:
    """Raise LrkvError for a beginning that is none, or that leaves no room to go on."""
    limit = min((limit for limit in map(positions, models) if limit is not None), default=None)
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


def measure_texts(
    candidates: list[Candidate],
    ids: list[Tensor],
    seq_len: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> list[list[Scores]]:
    """For every text (n,), the scores of all candidates."""
    batches = [text_windows(text, seq_len, batch_size) for text in ids]
    found, total, before = [], sum(map(len, batches)), 0
    for part in batches:
        found.append(measure(candidates, part, lambda done, _: progress(before + done, total)))
        before += len(part)
    return found


def joined(scores: list[Scores]) -> Scores:
    """Those of several texts as those of one."""
    every = lambda name: [window for score in scores for window in getattr(score, name)]
    return Scores(every("nll"), every("kl"), every("agree"))


@torch.no_grad()
def cached(candidate: Candidate, seq_len: int) -> dict[str, float]:
    """Bytes per token by the formula, and counted on the tensors of a live cache; a quantised one
    has no formula: its scales depend on its backend.
    """
    model = candidate.model
    if candidate.cache:
        cache = candidate.empty(seq_len)
        candidate.read(torch.zeros(1, seq_len, dtype=torch.long), cache, logits_to_keep=1)
        allocated = cache_bytes(cache) / seq_len
        return {"kv_bytes_per_token": allocated, "kv_bytes_per_token_allocated": allocated}
    allocated, formula = (
        allocated_bytes(model, min(16, seq_len)),
        formula_bytes(model.config, model.dtype.itemsize),
    )
    return {
        "kv_bytes_per_token": allocated if formula is None else formula,
        "kv_bytes_per_token_allocated": allocated,
    }


def read_far(
    candidates: list[Candidate],
    names: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    ids: list[Tensor],
    length: int,
    progress: Progress,
) -> dict:
    """The passkey task, and loss and divergence by position in windows of `length` tokens of all
    texts.
    """
    whole = [text[: len(text) // length * length] for text in ids if len(text) >= length]
    scores = [
        joined(list(column))
        for column in zip(
            *measure_texts(
                candidates, whole, length, 1, lambda done, total: progress("far", done, total)
            )
        )
    ]
    lengths = [
        part
        for part in sorted({length // share for share in (4, 2, 1)})
        if part >= shortest(tokenizer)
    ]
    found = passkeys(
        candidates, tokenizer, lengths, lambda done, total: progress("passkey", done, total)
    )
    return {
        "tokens": length,
        "windows": len(scores[0].nll),
        "models": [
            {**name, "context": by_context(scores[0], own), "passkey": rows}
            for name, own, rows in zip(names, scores, found)
        ],
    }
