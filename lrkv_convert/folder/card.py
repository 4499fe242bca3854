"""The model card of a converted folder: what it is, from what, by which commands, what it cost, how
to load and serve it. The text lies in data/card.jinja.

The metadata in front is the hub's; what the source says of its licence and languages is carried
over, for it goes on to apply.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from ..errors import LrkvError
from ..families import family_named
from ..format import Cost, Evaluation, Layer, Record
from ..lora import attention_targets
from ..modeling.contract_lrkv import TESTED
from .markup import block, cell, code, front, literal, prose, quoted
from .provenance import commands

# what options of the wrong kind, in a recipe, or figures that no training gives, lead to
ODD = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError)
CARRIED = ("license", "license_name", "license_link", "language")
PICTURE, CURVE = "cache.png", "heal.png"
# of what compare measures beside perplexity: the heading, and the field; a column stands where a
# model has a value
COLUMNS = {
    "same top token": "top1_agreement",
    "same words": "same_words",
    "word errors": "word_error_rate",
    "cache": "kv_ratio",
    "cache, self": "self_ratio",
    "cache, cross": "cross_ratio",
}
GOALS = {
    "kl": "divergence from the original",
    "ce": "cross-entropy",
    "mix": "divergence from the original and cross-entropy",
}


@dataclass(frozen=True)
class Task:
    """What a model does. name: as the hub calls it; given: what `lrkv compare` measures it on;
    unlike, lose: a subject and its verb.
    """

    name: str
    given: str
    unlike: str = "texts unlike those"
    lose: str = "lose"


WRITES = Task("text-generation", "--text FILE")
TRANSLATES = Task("text2text-generation", "--pairs FILE")
HEARS = Task("automatic-speech-recognition", "--audio FOLDER", "speech unlike that", "loses")


@dataclass(frozen=True)
class Kind:
    """A kind of attention as the card speaks of it."""

    name: str
    unit: str
    cache: Cost
    layers: tuple[Layer, ...]


NAMES = {
    "self": ("decoder self-attention", "decoded token"),
    "cross": ("cross-attention", "encoder position"),
}


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


def metadata(record: Record, carried: dict, name: str) -> dict:
    """The YAML in front of the card. carried: `source_metadata` of the source, or of an earlier
    card of this model.
    """
    source, task = record.source.name, task_of(record)
    found = {
        **carried,
        "library_name": "transformers",
        "pipeline_tag": task.name,
        "tags": ["lrkv", "kv-cache"],
    }
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        found["base_model"] = source
    # of each text the last
    results = {
        text.name: {
            "task": {"type": task.name},
            "dataset": {"name": text.name, "type": text.name},
            "metrics": [{"type": "perplexity", "value": round(text.perplexity, 4)}],
        }
        for measured in record.evaluations
        for text in measured.rows[-1].texts
    }
    if results:
        found["model-index"] = [{"name": name, "results": list(results.values())}]
    return found


def task_of(record: Record) -> Task:
    """What the source, and so the model, does."""
    family = family_named(record.source.model_type)
    if family is None or family.encoder is None:
        return WRITES
    return HEARS if family.speech else TRANSLATES


def model_card(record: Record, carried: dict, name: str, picture: bool = False) -> str:
    """README.md of a converted folder called `name`. picture: whether PICTURE lies beside it.
    Raises LrkvError for a record that is not one of ours.
    """
    task = task_of(record)
    one = task is WRITES and set(record.attention) == {"self"}
    called = {"self": ("", "token")} if one else NAMES
    try:
        body = TEMPLATES.get_template("card.jinja").render(
            record=record,
            name=name,
            source=record.source.name,
            task=task,
            one=one,
            kinds=[
                Kind(*called[kind], fitted.cache, fitted.layers)
                for kind, fitted in record.attention.items()
            ],
            use=TEMPLATES.get_template(f"use-{task.name}.jinja").render(name=name).rstrip(),
            coded=any(
                side.bits is not None
                for fitted in record.attention.values()
                for layer in fitted.layers
                for side in (layer.keys, layer.values)
            ),
            tested=TESTED,
            targets=attention_targets(record),
            commands=commands(record, name.rpartition("/")[2]),
            columns_of=columns_of,
            calibrated_on=lambda measured: calibrated_on(record, measured),
            goals=GOALS,
            exp=math.exp,
            zip=zip,
            licence=licence(carried),
            picture=PICTURE if picture else None,
            curve=CURVE,
        )
        # where a part is not there, its empty lines are
        body = re.sub(r"\n{3,}", "\n\n", body)
        return f"---\n{front(metadata(record, carried, name))}---\n{body}"
    except ODD as error:
        raise LrkvError(
            f"lrkv.json of {name} is not as lrkv convert wrote it: {type(error).__name__} at"
            f" {error}",
            "convert the model again",
        ) from error


def columns_of(measured: Evaluation) -> dict[str, str]:
    """Those of COLUMNS that some model has a value for."""
    has = lambda field: any(getattr(row, field) is not None for row in measured.rows)
    return {heading: field for heading, field in COLUMNS.items() if has(field)}


def calibrated_on(record: Record, measured: Evaluation) -> list[str]:
    """Names of the measured texts that the model was calibrated on."""
    known = {text.sha256 for text in record.calibration.texts}
    return [name for name, sha256 in zip(measured.texts, measured.sha256) if sha256 in known]


def licence(carried: dict) -> str:
    """A sentence on the licence."""
    if "license" not in carried:
        return "The licence of the source model applies; no card beside the weights named one."
    value = carried["license"]
    named = value if isinstance(value, str) else ", ".join(value)
    return f"The licence of the source, {prose(named)}, applies."


def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("lrkv_convert", "data"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "prose": prose,
        "code": code,
        "cell": cell,
        "literal": literal,
        "quoted": quoted,
        "block": lambda lines, language: block(language, lines),
        "listed": lambda names: ", ".join(map(prose, names)),
        "percent": lambda share: "" if share is None else f"{share:.1%}",
    }
    return found


TEMPLATES = _templates()
