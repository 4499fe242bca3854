"""Load any model that can be compared: an original or a converted folder, a .gguf file, a hub id.
Complete, finite, or not at all.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import LrkvError, first_line
from ..families import CONVERTED, Family, family_named
from ..modeling import auto_class
from ..source import Checkpoint, check_finite, open_folder
from ..source.configs import parse_config, read_config_json
from ..source.names import describe, placed, unplaced
from ..source.skeleton import plainly


def location(model: str) -> tuple[str, dict]:
    """(path or hub id, keyword arguments) for `from_pretrained`. Raises LrkvError for a local path
    that is no model.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LrkvError(f"no such file: {model}", "give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        read_config_json(path, model)
    if not path.exists() and not (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        raise LrkvError(
            f"no such model: {model}", "give a folder, a .gguf file or a hub id such as org/name"
        )
    return (str(path), {}) if path.exists() else (model, {})


def read_config(model: str) -> PreTrainedConfig:
    """The config of an original or a converted model. Raises LrkvError."""
    where, extra = location(model)
    if extra:
        from ..source.gguf import gguf_config

        return gguf_config(Path(where) / extra["gguf_file"])
    return parse_config(where, model)


def load_model(
    model: str,
    device: torch.device,
    dtype: torch.dtype | str = "auto",
    auto: type | None = None,
    **kwargs,
) -> PreTrainedModel:
    """The model in eval mode, by this auto class or, with None, by that of its family. Raises
    LrkvError if it cannot be read, if any
    weight would be freshly initialised, if one is not finite, and if the folder holds one that
    would change the model and has no place in it.
    """
    where, extra = location(model)
    config = read_config(model)
    auto = auto or auto_of(config)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # older transformers take sdpa, which drops the cap
        kwargs.setdefault("attn_implementation", "eager")
    if Path(where).is_dir() and not extra:
        check_folder(model, Path(where), config, auto)
    elif extra:
        kwargs["config"] = config  # transformers' own leaves out how RoPE is scaled
    try:
        loaded, info = auto.from_pretrained(
            where, dtype=dtype, output_loading_info=True, **extra, **kwargs
        )
    except Exception as error:  # safetensors, json, hub and transformers each raise their own
        raise LrkvError(
            f"cannot load {model}: {first_line(error)}", "is the folder whole?"
        ) from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        bad = sorted(info["missing_keys"]) or sorted(info["mismatched_keys"])
        raise LrkvError(
            f"{model} lacks the tensor {bad[0]}",
            "its weights are incomplete or do not belong to its config.json",
        )
    unplaced(
        {name: name for name in info["unexpected_keys"]},
        {},
        loaded,
        model,
        strict=config.model_type.startswith(CONVERTED),
    )
    for name, parameter in loaded.named_parameters():
        check_finite(f"{model}: {name}", parameter.detach())
    # transformers wraps `to`, and loses `self` for the checker
    return plainly(loaded).eval().to(device)  # pyright: ignore[reportArgumentType]


def auto_of(config: PreTrainedConfig) -> type:
    """The auto class that loads a model with its head."""
    family = family_named(config.model_type)
    return AutoModelForCausalLM if family is None else auto_class(family.model_type)


def check_folder(model: str, path: Path, config: PreTrainedConfig, auto: type) -> Checkpoint | None:
    """Hold a folder's files against its config before transformers makes room for what the config
    asks. Its tensors, under the names they have in the model; None where they are another's affair.
    Raises LrkvError.
    """
    if getattr(config, "quantization_config", None):
        return None
    checkpoint, family = open_folder(path, model, config), family_named(config.model_type)
    described = describe(checkpoint, auto)
    return None if family is None else placed(checkpoint, described, family.any.stored)


def refuse_encoder(model: str, config: PreTrainedConfig) -> None:
    """Raise LrkvError for an encoder-decoder where a decoder on its own is asked for, saying what
    it reads.
    """
    family = family_named(config.model_type)
    if family is not None and family.encoder is not None:
        kind, option = (
            ("speech", "--audio FOLDER")
            if family.speech
            else ("one text and writes another", "--pairs FILE")
        )
        raise LrkvError(
            f"{model} is an encoder-decoder, which reads {kind}",
            f"lrkv compare takes it with {option}, lrkv eval as well",
        )


def family_with_encoder(model: str) -> Family:
    """The family of a model, original or converted. Raises LrkvError for one without an encoder."""
    config = read_config(model)
    family = family_named(config.model_type)
    if family is None or family.encoder is None:
        raise LrkvError(
            f"{model} has no encoder: it reads plain text",
            "give --text, and neither --audio nor --pairs",
        )
    family.refuse(config)
    return family


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    where, extra = location(model)
    try:
        return AutoTokenizer.from_pretrained(where, **extra)
    except Exception as error:
        raise LrkvError(
            f"{model} has no tokenizer that loads: {first_line(error)}", "comparison needs one"
        ) from error
