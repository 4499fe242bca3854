"""The small JSON files of a model folder: read as what they should be, or refused in one line."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..errors import LrkvError, first_line
from ..schema import kind_of, read_object

TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load_config(path: Path, source: str, **kwargs) -> PreTrainedConfig:
    """The config of an original: with `gguf_file`, of that file. Raises LrkvError, with
    transformers' words where it knows better."""
    if not kwargs:
        raw = read_config_json(path, source)
        if str(raw.get("model_type", "")).startswith("lrkv_"):
            raise LrkvError(
                f"{source} is already an LRKV model",
                "convert its original instead; lrkv.json names it",
            )
    return parse_config(path, source, **kwargs)


def read_config_json(path: Path, source: str) -> dict:
    """config.json as it stands. Raises LrkvError for a folder that is no model, saying what it is
    where that is known."""
    file = path / "config.json"
    if not file.is_file():
        refuse_adapter(path, source)
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = (
            f"give the file itself: {path / ggufs[0]}"
            if ggufs
            else "a model folder has a config.json beside its safetensors"
        )
        raise LrkvError(f"{source} is not a model folder: it has no config.json", hint)
    try:
        raw = read_object(file)
    except LrkvError as error:
        raise LrkvError(
            f"cannot read the config of {source}: {error.message}", error.hint
        ) from error
    if not isinstance(raw.get("model_type", ""), str):
        raise LrkvError(
            f"cannot read the config of {source}: model_type is {kind_of(raw['model_type'])}",
            'it names the family, as in "llama"',
        )
    return raw


def parse_config(path: Path | str, source: str, **kwargs) -> PreTrainedConfig:
    """What transformers makes of a config. Raises LrkvError."""
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except Exception as error:  # fields of the wrong kind raise whatever they lead to
        raise LrkvError(
            f"cannot read the config of {source}: {first_line(error)}",
            "is config.json whole, and of a known family?",
        ) from error


def refuse_adapter(path: Path, source: str) -> None:
    """Raise LrkvError for a folder that holds an adapter of PEFT, saying what to do with it."""
    if (path / "adapter_config.json").is_file():
        base = read_object(path / "adapter_config.json").get("base_model_name_or_path")
        raise LrkvError(
            f"{source} is a PEFT adapter of {base or 'a model it does not name'}, not a model",
            "merge it first: AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
            ".merge_and_unload().save_pretrained(NEW),"
            " and convert NEW",
        )


def check_companions(path: Path) -> None:
    """Raise LrkvError for a tokenizer's file that is there and is no JSON object."""
    for name in TOKENIZER_JSON:
        if (path / name).is_file():
            read_object(path / name)
