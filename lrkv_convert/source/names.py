"""Which tensors count, and under which names: those that from_pretrained would put into the
model, where it would put them.

    names in the files --transformers' renaming, prefix--> names in the model --ties--> weights
                                   \\--> no place: harmless, named in a notice, or refused

transformers does not undo what other libraries put before names (torch.compile, DDP, PEFT) and
starts such a model at random; here it is refused, saying what it is.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import LrkvError, first_line
from .checkpoint import Checkpoint

# buffers of older releases, which are computed from the config now: RoPE tables, causal masks,
# positions, a version number
HARMLESS = re.compile(
    r"(rotary_emb|rope|rotary)\.(inv_freq|original_inv_freq|cos_cached|sin_cached|embed_positions)$"
    r"|(^|\.)masked_bias$"
    r"|(^|\.)position_ids$|(^|\.)causal_mask$|(^|\.)decoder\.version$"
    r"|(^|\.)embed_positions\._float_tensor$"
    r"|(^|\.)attn\.embed_positions$"
)
MASK = re.compile(
    r"(attn|attention|self_attention)\.bias$"
)  # of GPT-2 and its kin: a matrix; a bias would be a vector
COUNTS = re.compile(r"^(num|n)_.*(head|expert)|_heads$")
AT_ONCE = 4096  # rows compared at once
LAYERS = (
    "num_hidden_layers",
    "decoder_layers",
    "num_decoder_layers",
)  # as configs call their number
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "_forward_module.": "Lightning Fabric",
    "module.": "DataParallel, DDP or DeepSpeed",
}
ADAPTED = re.compile(r"\.(lora_|base_layer\.|ia3_|hada_|oft_|adalora_)")


def describe(checkpoint: Checkpoint, auto: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The model of a checkpoint's config without any memory, to hold names and shapes against.
    Raises LrkvError."""
    config, source = checkpoint.config, checkpoint.source
    there = _numbered(checkpoint.tensors)
    for layers in (getattr(config, field) for field in LAYERS if hasattr(config, field)):
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise LrkvError(
                f"the config of {source} asks for {layers} layers",
                "is config.json that of these weights?",
            )
        if layers > there:  # before they are built: a million take all memory
            raise LrkvError(
                f"{source} holds {there} layers, its config.json asks for {layers:,}",
                "a shard may be missing; download the checkpoint again",
            )
    largest = max((size for held in checkpoint.tensors.values() for size in held.shape), default=0)
    for (
        field,
        count,
    ) in config.to_dict().items():  # of modules that come in lists: heads may have a norm each
        if COUNTS.search(field) and isinstance(count, int) and "head" in field and count < 1:
            raise LrkvError(
                f"the config of {source} asks for {count} in {field}",
                "is config.json that of these weights?",
            )
        if COUNTS.search(field) and isinstance(count, int) and count > max(largest, there):
            raise LrkvError(
                f"the config of {source} asks for {count:,} in {field}, more than any of its "
                "tensors is wide",
                "is config.json that of these weights?",
            )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of sizes that are zero: what is wrong with them is told later
            return auto.from_config(copy.deepcopy(config))
    except Exception as error:  # of sizes and kinds that no model has: each its own
        raise LrkvError(
            f"no model can be built from the config of {source}: {type(error).__name__}: "
            f"{first_line(error)}",
            "is config.json that of these weights?",
        ) from error


def placed(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    stored: Callable[[dict], dict] = lambda tensors: tensors,
) -> Checkpoint:
    """The same checkpoint with its tensors under the names they have in `model` (`describe`),
    checked: nothing is missing, of another shape or type, and nothing would change the model and
    has no place in it. stored: `Adapter.stored`. Raises LrkvError."""
    tensors, model_names = stored(checkpoint.tensors), set(model.state_dict())
    found, left_over, first = {}, {}, {}
    for name, target in _renamed(model, tensors).items():
        if target not in model_names:
            left_over[name] = target
        elif target in found:
            if not _equal(checkpoint, tensors[name], found[target]):
                raise LrkvError(
                    f"{checkpoint.source} holds {target} twice, as {first[target]} and as {name}",
                    "remove the one that is not meant",
                )
        else:
            found[target], first[target] = tensors[name], name
    result = replace(checkpoint, tensors=found, config=copy.deepcopy(checkpoint.config))
    parameters = {
        name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
    }
    if (
        checkpoint.config.is_encoder_decoder
    ):  # what is tied there, and what may be missing, source/skeleton.py sees to
        result.check({name: shape for name, shape in parameters.items() if name in found})
    else:
        tied = _tie(result, model)
        expected = {name: shape for name, shape in parameters.items() if name not in tied}
        missing = next((name for name in expected if name not in found), None)
        if missing and (what := _wrapped(checkpoint.tensors, missing, checkpoint.source)):
            raise LrkvError(
                what,
                "transformers does not load it so either: save the inner model with "
                "save_pretrained, or take the prefix off the names",
            )
        result.check(expected)
    notice = unplaced(
        left_over,
        {name: tuple(held.shape) for name, held in tensors.items()},
        model,
        checkpoint.source,
    )
    return replace(result, notices=[*result.notices, *notice])


def _renamed(model: PreTrainedModel, names) -> dict[str, str]:
    """Each name as the model has it, in the order in which transformers loads. By transformers'
    own `rename_source_key` and `get_model_conversion_mapping`, as in releases 5.17 to 5.24, which
    are not part of its interface. Tensors that it would put together (experts) are together
    already (`Adapter.stored`), so that only its renamings apply."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise LrkvError(
            f"transformers {transformers.__version__} names tensors in another way than is known "
            "here",
            "install a release from 5.17 to 5.24",
        ) from error
    renamings = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)
    ]
    state, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for name in sorted(names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, [], prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        found[name] = target
    return found


def _equal(checkpoint: Checkpoint, a, b) -> bool:
    if tuple(a.shape) != tuple(b.shape):
        return False
    a, b = (replace(checkpoint, tensors={"one": held}).tensor("one") for held in (a, b))
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    return all(
        torch.equal(x.to(torch.float64), y.to(torch.float64))
        for x, y in zip(a.split(AT_ONCE), b.split(AT_ONCE))
    )


def _tie(checkpoint: Checkpoint, model: PreTrainedModel) -> set[str]:
    """As transformers ties: what stands once counts for both, what differs is not tied, whatever
    the config says. Returns the names that the model has under another; changes `checkpoint`,
    which is ours."""
    tied, tensors = set(), checkpoint.tensors
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in tensors
            and source in tensors
            and not _equal(checkpoint, tensors[target], tensors[source])
        ):
            checkpoint.config.tie_word_embeddings = False
            checkpoint.notices = [
                *checkpoint.notices,
                (
                    f"{target} differs from {source}: they are not tied, though the config says so,"
                    " as transformers has it"
                ),
            ]
            continue
        if target in tensors and source not in tensors:
            tensors[source] = tensors[target]
        tensors.pop(target, None)
        tied.add(target)
    return tied


def unplaced(
    left_over: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    model: PreTrainedModel,
    source: str,
    strict: bool = False,
) -> list[str]:
    """A notice for tensors that the model has no place for, or none. Raises LrkvError for those
    that stand inside one of its modules, which they would change: a bias the config denies, an
    adapter, a norm. left_over: name -> what it would be called in the model; strict: refuse all
    that is not harmless."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    harmless = lambda name: (
        HARMLESS.search(name)
        or MASK.search(name)
        and len(shapes.get(name, ())) != 1
        or any(p.search(name) for p in ignored)
    )
    strange = {name: target for name, target in left_over.items() if not harmless(name)}
    modules, base = dict(model.named_modules()), model.base_model_prefix
    for name, target in strange.items():
        if (
            strict
            or ADAPTED.search(f".{name}")
            or _inside(target, modules, base)
            or _inside(f"{base}.{target}", modules, base, outer=False)
        ):
            adapted = "it is part of an adapter: merge it, save the model and convert that"
            raise LrkvError(
                f"{source} holds {name}, for which the model of its config.json has no place",
                (
                    adapted
                    if ADAPTED.search(f".{name}")
                    else (
                        "weights and config.json do not belong together: it would change what the"
                        " model says"
                    )
                ),
            )
    if not strange:
        return []
    one, more = next(iter(strange)), f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return [
        f"the checkpoint holds {one}{more}, for which the model has no place: left out, as "
        "transformers does"
    ]


def _inside(name: str, modules: Mapping[str, nn.Module], base: str, outer: bool = True) -> bool:
    """Whether a tensor of this name would belong to a module the model has: not to another head,
    nor to one more layer of a list. outer: whether the base model itself counts as such a
    module."""
    at = name.rpartition(".")[0]
    while at and at not in modules:
        at = at.rpartition(".")[0]
    return bool(at) and not isinstance(modules[at], nn.ModuleList) and (outer or at != base)


def _numbered(names) -> int:
    """One more than the largest number in the names: at least as many layers are there."""
    return 1 + max(
        (
            int(part)
            for name in names
            for part in name.split(".")
            if part.isdecimal() and len(part) < 10
        ),
        default=-1,
    )


def _wrapped(names, missing: str, source: str) -> str | None:
    """What was put around the model whose names these are, in words; missing: the name of a
    tensor that was not found."""
    for wrapper, whose in WRAPPERS.items():
        if inner := next(
            (name for name in names if name.startswith(wrapper) or f".{wrapper}" in name), None
        ):
            return (
                f"{source} was saved from inside a wrapper of {whose}: its names hold {wrapper!r},"
                f" as in {inner}"
            )
    if inner := next((name for name in names if name.endswith(f".{missing}")), None):
        return (
            f"{source} is part of something else: its names begin with"
            f" {inner.removesuffix(missing)!r}, as in {inner}"
        )
    return None
