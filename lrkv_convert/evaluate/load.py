"""Load any model that can be compared: an original or a converted folder, a .gguf file, a hub id. Complete, or not at all."""
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import ENCODER_DECODERS
from ..errors import LrkvError, first_line


def location(model: str) -> tuple[str, dict]:
    """(path or hub id, keyword arguments) for `from_pretrained`. Raises LrkvError for a local path that is no model."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LrkvError(f"no such file: {model}", "give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise LrkvError(f"{model} is not a model folder: it has no config.json", "a model folder has config.json and safetensors")
    if not path.exists() and not (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        raise LrkvError(f"no such model: {model}", "give a folder, a .gguf file or a hub id such as org/name")
    return (str(path), {}) if path.exists() else (model, {})


def read_config(model: str) -> PreTrainedConfig:
    """The config of an original or a converted model. Raises LrkvError."""
    where, extra = location(model)
    try:
        return AutoConfig.from_pretrained(where, **extra)
    except Exception as error:      # as below
        raise LrkvError(f"cannot read the config of {model}: {first_line(error)}", "is config.json whole, and of a known family?") from error


def load_model(model: str, device: torch.device, dtype: torch.dtype | str = "auto", auto: type = AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
    """The model in eval mode, by this auto class. Raises LrkvError if it cannot be read, or if any weight would be freshly initialised."""
    where, extra = location(model)
    config = read_config(model)
    if auto is AutoModelForCausalLM:
        refuse_encoder(model, config)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        kwargs.setdefault("attn_implementation", "eager")       # older transformers take sdpa, which drops the cap
    try:
        loaded, info = auto.from_pretrained(where, dtype=dtype, output_loading_info=True, **extra, **kwargs)
    except Exception as error:      # safetensors, json, hub and transformers each raise their own
        raise LrkvError(f"cannot load {model}: {first_line(error)}",
                        "is the folder whole?") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        bad = sorted(info["missing_keys"]) or sorted(info["mismatched_keys"])
        raise LrkvError(f"{model} lacks the tensor {bad[0]}", "its weights are incomplete or do not belong to its config.json")
    return loaded.eval().to(device)


def refuse_encoder(model: str, config: PreTrainedConfig) -> None:
    """Raise LrkvError for an encoder-decoder, saying what it reads: transformers would load its decoder alone."""
    family = ENCODER_DECODERS.get(config.model_type.removeprefix("lrkv_"))
    if family is not None:
        kind, option = ("speech", "--audio FOLDER") if family.speech else ("one text and writes another", "--pairs FILE")
        raise LrkvError(f"{model} is an encoder-decoder, which reads {kind}", f"lrkv compare takes it with {option}, transformers' generate as it is; other commands do not")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    where, extra = location(model)
    try:
        return AutoTokenizer.from_pretrained(where, **extra)
    except Exception as error:
        raise LrkvError(f"{model} has no tokenizer that loads: {first_line(error)}",
                        "comparison needs one") from error
