"""The model card of a converted folder: what it is, from what, by which commands, what it cost, how
to load and serve it.

The metadata in front is the hub's; what the source says of its licence and languages is carried
over, for it goes on to apply.
"""

import math
import re
from pathlib import Path

import yaml

from ..errors import LrkvError
from ..families import family_named
from ..lora import attention_targets
from ..modeling.contract_lrkv import TESTED
from .markup import block, cell, code, front, literal, prose, quoted
from .provenance import commands

CARRIED = ("license", "license_name", "license_link", "language")
PICTURE, CURVE = "cache.png", "heal.png"
RELEASES = f"The files are tested with transformers {TESTED[0]} to {TESTED[1]}."


def source_metadata(folder: Path) -> dict:
    """What the model card in a folder says of licence and languages; {} without one."""
    card = folder / "README.md"
    front = re.match(
        r"---\n(.*?)\n---\s*$",
        card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "",
        re.S | re.M,
    )
    try:
        found = yaml.safe_load(front[1]) if front else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: the 31st of February
        return {}
    return (
        {name: found[name] for name in CARRIED if name in found and _plain(found[name])}
        if isinstance(found, dict)
        else {}
    )


def _plain(value) -> bool:
    """Whether this is a word, or a list of words."""
    return (
        isinstance(value, str)
        or isinstance(value, list)
        and all(isinstance(word, str) for word in value)
    )


def metadata(record: dict, carried: dict, name: str) -> dict:
    """The YAML in front of the card. carried: `source_metadata` of the source, or of an earlier
    card of this model.
    """
    source = record["source"]["name"]
    found = {
        **carried,
        "library_name": "transformers",
        "pipeline_tag": _task(record),
        "tags": ["lrkv", "kv-cache"],
    }
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        found["base_model"] = source
    # of each text the last
    results = {
        result["dataset"]["name"]: result
        for measured in record.get("evaluations", [])
        for result in _results(measured, _task(record))
    }
    if results:
        found["model-index"] = [{"name": name, "results": list(results.values())}]
    return found


def _task(record: dict) -> str:
    """As the hub calls it."""
    family = family_named(record["source"]["model_type"])
    return (
        "text-generation"
        if family is None or family.encoder is None
        else "automatic-speech-recognition"
        if family.speech
        else "text2text-generation"
    )


def _results(measured: dict, task: str) -> list[dict]:
    """One evaluation as the hub's metadata has it: a result per text."""
    return [
        {
            "task": {"type": task},
            "dataset": {"name": text["name"], "type": text["name"]},
            "metrics": [{"type": "perplexity", "value": round(text["perplexity"], 4)}],
        }
        for text in measured["rows"][-1]["texts"]
    ]


def model_card(record: dict, carried: dict, name: str, picture: bool = False) -> str:
    """README.md of a converted folder called `name`. picture: whether PICTURE lies beside it.
    Raises LrkvError for a record that is not one of ours.
    """
    try:
        return (
            encoder_decoder_card(record, carried, name)
            if set(record["attention"]) != {"self"} or _task(record) != "text-generation"
            else decoder_card(record, carried, name, picture)
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise LrkvError(
            f"lrkv.json of {name} is not as lrkv convert wrote it: {type(error).__name__} at"
            f" {error}",
            "convert the model again",
        ) from error


def decoder_card(record: dict, carried: dict, name: str, picture: bool) -> str:
    fitted, source = record["attention"]["self"], record["source"]["name"]
    cache, history = fitted["cache"], record["history"]
    texts = _listed(t["name"] for t in record["calibration"]["texts"]) or "none (weights only)"
    return f"""---
{front(metadata(record, carried, name))}---
# {prose(name)}

{code(source)} with LRKV attention (Low-Rank Key-Value attention, arXiv 2601.11471). Each token caches
**{cache["kv_bytes_per_token"]:,} bytes instead of {cache["kv_bytes_per_token_before"]:,} ({cache["kv_ratio"]:.1%})**. Converted by lrkv-convert
{prose(record["versions"]["lrkv_convert"])} {"and healed (below)" if history else "without training"}; calibration: {texts}, {record["calibration"]["tokens"]:,} tokens.

## Use

{block("python", TEXT_GENERATION.format(name=literal(name)))}

The attention lies in the Python files beside the weights, which is what `trust_remote_code` allows; with lrkv-convert installed, `import lrkv_convert`
does instead. {RELEASES} To serve it (OpenAI-compatible): {code(f"lrkv serve {quoted([name])}")}.
{_tuning(record)}
## How it was made

{block("bash", chr(10).join(commands(record, name.rpartition("/")[2])))}

## What it cost

{_evaluations(record) or f"Not measured yet: {code(f'lrkv compare {quoted([source, name])} --text FILE --card')} writes perplexity beside the source's here."}
{"".join(healing_section(entry, i + 1, len(history)) for i, entry in enumerate(history))}
## Limits

Those of the source model. What is cached is an approximation of its keys and values: texts unlike those of the calibration{" and the training" if history else ""} lose more, so
measure on yours. {_licence(carried)}

## Fit

Numbers cached per token (shared base + H residuals of that rank) and relative error in the metric of the fit{", before healing" if history else ""}.
{f"{chr(10)}![what each layer caches]({PICTURE}){chr(10)}" if picture else ""}
{_fit(fitted["layers"])}
Source weights sha256 {code(record["source"]["sha256"])}; everything else about the conversion stands in `lrkv.json`.
"""


def _listed(names) -> str:
    return ", ".join(map(prose, names))


def _fit(layers: list[dict]) -> str:
    rows = "\n".join(
        f"| {x['layer']:d} | {x['keys']['base_width']:d} + H·{x['keys']['rank']:d} |"
        f" {x['keys']['error']:.3f} | {x['values']['base_width']:d} + H·{x['values']['rank']:d} |"
        f" {x['values']['error']:.3f} |"
        for x in layers
    )
    return f"| layer | keys | error | values | error |\n|---|---|---|---|---|\n{rows}\n"


def _tuning(record: dict) -> str:
    """What PEFT must be told: names that match nothing it passes over without a word."""
    return f"""
## Fine-tuning

Keys and values have no projections called `k_proj` and `v_proj` here, but factors, and PEFT says nothing of names that match no layer. LoRA on all of attention:

{block("python", f"peft.LoraConfig(target_modules=[{', '.join(map(literal, attention_targets(record)))}])")}

With lrkv-convert installed, `lrkv_convert.lora_targets(model, names)` translates any names that the source model has.
"""


def _licence(carried: dict) -> str:
    return (
        f"The licence of the source, {prose(_one(carried['license']))}, applies."
        if "license" in carried
        else "The licence of the source model applies; no card beside the weights named one."
    )


def _one(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


TEXT_GENERATION = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
SPEECH_USE = """from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer
model = AutoModelForSpeechSeq2Seq.from_pretrained({name}, trust_remote_code=True)
tokenizer, extractor = AutoTokenizer.from_pretrained({name}, trust_remote_code=True), AutoFeatureExtractor.from_pretrained({name})
features = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features      # samples: numbers in [-1, 1), one channel, 16,000 a second
print(tokenizer.decode(model.generate(features, max_new_tokens=224)[0], skip_special_tokens=True))"""
TEXT_USE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained({name}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("A text to read.", return_tensors="pt"), max_new_tokens=64)[0], skip_special_tokens=True))"""
KIND = {
    "self": ("decoder self-attention", "decoded token"),
    "cross": ("cross-attention", "encoder position"),
}


def encoder_decoder_card(record: dict, carried: dict, name: str) -> str:
    """README.md of a converted encoder-decoder called `name`."""
    source, calibration, kinds, history = (
        record["source"]["name"],
        record["calibration"],
        record["attention"],
        record["history"],
    )
    texts = _listed(t["name"] for t in calibration["texts"]) or "none (weights only)"
    cached = "\n".join(
        f"- **{KIND[kind][0]}: {x['cache']['kv_bytes_per_token']:,} bytes instead of"
        f" {x['cache']['kv_bytes_per_token_before']:,} ({x['cache']['kv_ratio']:.1%})** per"
        f" {KIND[kind][1]}"
        for kind, x in kinds.items()
    )
    tables = "\n".join(
        f"{KIND[kind][0].capitalize()}:\n\n{_fit(x['layers'])}" for kind, x in kinds.items()
    )
    speech = _task(record) == "automatic-speech-recognition"
    measure = (
        f"lrkv compare {quoted([source, name])} {'--audio FOLDER' if speech else '--pairs FILE'}"
        " --card"
    )
    return f"""---
{front(metadata(record, carried, name))}---
# {prose(name)}

{code(source)} with LRKV attention in its decoder (Low-Rank Key-Value attention, arXiv 2601.11471). It caches

{cached}

Converted by lrkv-convert {prose(record["versions"]["lrkv_convert"])} {"and healed (below)" if history else "without training"}; calibration: {texts}, {calibration["examples"]:,} examples, {calibration["tokens"]:,} target tokens{_by_the_model(calibration)}.

## Use

{block("python", (SPEECH_USE if speech else TEXT_USE).format(name=literal(name)))}

The attention lies in the Python files beside the weights, which is what `trust_remote_code` allows; with lrkv-convert installed, `import lrkv_convert` does instead. {RELEASES}
{_tuning(record)}
## How it was made

{block("bash", chr(10).join(commands(record, name.rpartition("/")[2])))}

## What it cost

{_written(record) or f"Not measured yet: {code(measure)} writes perplexity beside the source's here."}
{"".join(healing_section(entry, i + 1, len(history)) for i, entry in enumerate(history))}
## Limits

Those of the source model. What is cached is an approximation of its keys and values: {"speech" if speech else "texts"} unlike {"that" if speech else "those"} of the calibration{" and the training" if history else ""} lose{"s" if speech else ""} more, so
measure on yours. {_licence(carried)}

## Fit

Numbers cached per {" or ".join(KIND[kind][1] for kind in kinds)} (shared base + H residuals of that rank) and relative error in the metric of the fit{", before healing" if history else ""}.

{tables}
Source weights sha256 {code(record["source"]["sha256"])}; everything else about the conversion stands in `lrkv.json`.
"""


def _written(record: dict) -> str:
    """Tables of what `lrkv compare --card` measured of an encoder-decoder."""
    tables = []
    for measured in record.get("evaluations", []):
        percent = lambda value: "" if value is None else f"{value:.1%}"
        rows = "\n".join(
            f"| {prose(row['name'])} | {row['perplexity']:.3f} | ×{row['ratio']:.4f}{_spread(row)}"
            f" | {row['kl']:.4f} | {percent(row['same_words'])} | {percent(row['word_error_rate'])}"
            f" | {row['self_ratio']:.1%} | {row['cross_ratio']:.1%} |"
            for row in measured["rows"]
        )
        tables.append(
            f"{_listed(measured['texts'])}: {measured['tokens']:,} tokens predicted,"
            f" {prose(measured['dtype'])},"
            f" {prose(measured['date'])}.{_known(record, measured)}\n\n| model | perplexity | ratio"
            f" (95 % interval) | KL to {cell(measured['rows'][0]['name'])} | same words | word"
            f" errors | cache, self | cache, cross |\n|---|---|---|---|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(tables)


def _known(record: dict, measured: dict) -> str:
    """A remark where a model was measured on what it was calibrated on."""
    known = {text["sha256"] for text in record["calibration"]["texts"]}
    names = [name for name, sha256 in zip(measured["texts"], measured["sha256"]) if sha256 in known]
    return (
        f" **Calibrated on {_listed(names)}: the figures say little about anything else.**"
        if names
        else ""
    )


def _by_the_model(calibration: dict) -> str:
    written, all_of_them = calibration["targets_by_the_model"], calibration["examples"]
    return (
        ""
        if not written
        else (
            f" ({'all' if written == all_of_them else f'{written:,} of them'} written by the source"
            " model itself)"
        )
    )


def _evaluations(record: dict) -> str:
    """Tables of what `lrkv compare --card` measured."""
    tables = []
    for measured in record.get("evaluations", []):
        rows = "\n".join(
            f"| {prose(row['name'])} | {row['perplexity']:.3f} | ×{row['ratio']:.4f}{_spread(row)}"
            f" | {row['kl']:.4f} | {row['top1_agreement']:.1%} | {row['kv_ratio']:.1%} |"
            for row in measured["rows"]
        )
        tables.append(
            f"{_listed(measured['texts'])}: {measured['tokens']:,} tokens predicted in windows of"
            f" {prose(measured['seq_len'])}, {prose(measured['dtype'])},"
            f" {prose(measured['date'])}.{_known(record, measured)}\n\n| model | perplexity | ratio"
            f" (95 % interval) | KL to {cell(measured['rows'][0]['name'])} | same top token | cache"
            f" |\n|---|---|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(tables)


def _spread(row: dict) -> str:
    return (
        f" ({row['ratio_low']:.4f}–{row['ratio_high']:.4f})" if row["ratio_low"] is not None else ""
    )


def _targets(entry: dict) -> str:
    """A remark where a model wrote targets of what was trained on."""
    written = entry.get("targets_by_the_model")
    writer = "the source model" if entry["teacher"] else "the converted model"
    return f" ({written:,} targets written by {writer} itself)" if written else ""


def healing_section(entry: dict, number: int, count: int) -> str:
    """One round of continued training, the number-th of `count`; the picture in the folder is the
    last one's.
    """
    nll, recipe, names = (
        entry["validation"]["nll"],
        entry["recipe"],
        {"converted": "converted" if number == 1 else "before"},
    )
    base = nll.get("original", nll["converted"])
    rows = "\n".join(
        f"| {names.get(name, name)} | {math.exp(nll[name]):.3f} |"
        f" ×{math.exp(nll[name] - base):.4f} |"
        for name in ("original", "converted", "healed")
        if name in nll
    )
    goal = {"kl": "divergence from the original", "ce": "cross-entropy"}.get(
        entry["loss"], "divergence from the original and cross-entropy"
    )
    text = entry["validation"].get("text", "held out")
    where = "held out between what was trained on" if text == "held out" else f"of {_listed(text)}"
    return f"""
## Healing{f" {number}" if count > 1 else ""}

{entry["tokens"]:,} tokens of {_listed(entry["data"])}{_targets(entry)} in {entry["steps"]:,} steps ({prose(entry["date"])}): {goal}, {prose(recipe["train"])} weights,
{"Muon and AdamW" if recipe["optimizer"] == "muon" else "AdamW"}. On {entry["validation"]["tokens"]:,} tokens {where}:

| model | perplexity | ratio |
|---|---|---|
{rows}
{f"{chr(10)}![curve of the training]({CURVE}){chr(10)}" if entry["picture"] and number == count else ""}"""
