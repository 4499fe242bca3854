"""Which layers an adapter such as LoRA is put on.

A converted model has no k_proj and v_proj, but keys.W_shared, keys.U, values.W_shared and values.U,
and PEFT says nothing of names that match no layer as long as one matches."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import LrkvError
from .families import Adapter, family_named
from .format import Record

# what people write, whatever the family calls its own
USUAL = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
FACTORS = ("W_shared", "U")


def lora_targets(
    model: PreTrainedModel | str | Path, names: Sequence[str] = tuple(USUAL)
) -> list[str]:
    """The layers of a converted model, or folder, that an adapter meant for `names` belongs on:
    what LoraConfig takes as target_modules.

    names: as in the source model (q_proj, c_attn, query_key_value, down_proj, ...), the usual four
    for any family, or as in this one. Raises LrkvError for a name that matches nothing.
    """
    where = model.config.model_type if isinstance(model, nn.Module) else str(model)
    model = model if isinstance(model, nn.Module) else _built(where)
    if not str(model.config.model_type).startswith("lrkv_"):
        raise LrkvError(f"{where} is no converted model", "there, PEFT takes names as they are")
    family, linear = family_named(model.config.model_type), nn.Linear | Conv1D
    assert family is not None, "what was converted is of a family"
    adapters = list(family.kinds.values())
    layers = [name for name, module in model.named_modules() if isinstance(module, linear)]
    found = []
    for name in [names] if isinstance(names, str) else map(str, names):
        path, dot, last = name.rpartition(".")
        meant = [path + dot + target for adapter in adapters for target in _meant(last, adapter)]
        there = [target for target in dict.fromkeys([name, *meant]) if _matches(target, layers)]
        if not there:
            message = f"no layer of {where} is called {name!r}, nor was one of its source"
            raise LrkvError(message, f"it has {', '.join(sorted(set(map(_short, layers))))}")
        found += there
    return list(dict.fromkeys(found))


def _matches(target: str, layers: list[str]) -> bool:
    """As PEFT looks: whole names, or what comes after a point."""
    return any(f".{layer}".endswith(f".{target}") for layer in layers if target)


def _short(layer: str) -> str:
    parts = layer.split(".")
    return ".".join(parts[-2:] if parts[-1] in FACTORS else parts[-1:])


def attention_targets(record: Record) -> list[str]:
    """The same for all of attention, as lrkv.json tells it."""
    if (family := family_named(record.source.model_type)) is None:
        raise LrkvError(
            f"the family {record.source.model_type!r} is not known, so that this record is not as"
            " lrkv convert wrote it",
            "update lrkv-convert, or convert the model again",
        )
    adapters = list(family.kinds.values())
    factors = [
        f"{side}.{factor}"
        for side in ("keys", "values")
        for factor, size in zip(FACTORS, ("base_width", "rank"))
        if any(
            getattr(getattr(layer, side), size)
            for kind in record.attention.values()
            for layer in kind.layers
        )
    ]
    unchanged = [
        name for adapter in adapters for name in adapter.projections[1:] if family.encoder
    ]  # the encoder's
    return list(dict.fromkeys([adapters[0].query, *unchanged, *factors, adapters[0].output]))


def _meant(name: str, adapter: Adapter) -> list[str]:
    """The names in a converted layer of what its source, or people, call `name`."""
    projections = (
        dict(zip(adapter.projections, "qkv"))
        if len(adapter.projections) == 3
        else {adapter.projections[0]: "qkv"}
    )
    layers = {
        "q": [adapter.query],
        "k": [f"keys.{factor}" for factor in FACTORS],
        "v": [f"values.{factor}" for factor in FACTORS],
        "o": [adapter.output],
    }
    return [
        layer
        for kind in (USUAL | projections | {adapter.output: "o"}).get(name, "")
        for layer in layers[kind]
    ]


def _built(folder: str) -> PreTrainedModel:
    """The model of a folder without its weights."""
    from .evaluate.load import read_config
    from .folder.target import empty_target

    config = read_config(folder)
    if not config.model_type.startswith("lrkv_"):
        raise LrkvError(f"{folder} is no converted model", "there, PEFT takes names as they are")
    return empty_target(config)
