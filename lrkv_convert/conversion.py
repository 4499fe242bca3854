"""The story of a conversion:

    checkpoint --adapter--> per-head weights --calibrate--> metrics --factorise--> factors --writer--> model folder
"""
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import Adapter, Geometry, adapter_for
from .calibrate import BUILT_IN, SEQ_LEN, CalibratedLayer, Skeleton, calibrated_layers, read_texts, windows
from .checkpoint import Checkpoint, check_finite, open_checkpoint
from .device import pick_device, pick_dtype
from .errors import LrkvError
from .factorise import BASES, Factors
from .modeling import FAMILIES
from .plan import LayerPlan, Plan, uniform_plan
from .refit import NOTHING_LOST, refit_output
from .report import converted_config, conversion_record, write_companions
from .writer import ShardWriter, check_output, new_folder

Progress = Callable[[str, int, int], None]      # (stage, done, total)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do in a dry run: the plan, and the record that stands in lrkv.json (None in a dry run)."""

    plan: Plan
    out: Path
    record: dict | None


def convert(model: str, out: str | Path, *, rank: int | None = None, rank_k: int | None = None, rank_v: int | None = None,
            base: str = "joint", refit: bool = True, calibration: list[str] | None = None, calibration_tokens: int = 16384, dtype: str = "auto",
            device: str = "auto", max_shard_size: int | str = "5GB", overwrite: bool = False, force: bool = False, dry_run: bool = False,
            recipe: str | None = None, progress: Progress = lambda *_: None) -> Conversion:
    """Convert `model` (folder, .gguf file or hub id) to LRKV and write the folder `out`.

    rank, rank_k, rank_v: residual rank of keys and values (none: the cache is halved); base: joint, aligned or mean; refit: correct W_O in
    closed form afterwards (needs calibration text); calibration: text
    files or folders, [] for none, None for the text that ships with the package; dtype: of the output, "auto" keeps the source's;
    device: "auto", "cpu", "cuda"; force: allow a cache that does not shrink; recipe: name to record. Raises LrkvError for anything that
    cannot be converted exactly as asked; then nothing is left behind.
    """
    started, out = time.perf_counter(), Path(out)
    options = {"rank": rank, "rank_k": rank_k, "rank_v": rank_v, "base": base, "refit": refit, "calibration": calibration,
               "calibration_tokens": calibration_tokens, "dtype": dtype, "force": force, "name": recipe}
    checkpoint, adapter = open_model(model)
    geometry, stored = adapter.geometry(checkpoint.config), stored_dtype(checkpoint, adapter, dtype)
    if base not in BASES:
        raise LrkvError(f"unknown base {base!r}", f"choose from {', '.join(BASES)}")
    plan = uniform_plan(geometry, stored.itemsize, rank, rank_k, rank_v, force)
    check_output(out, checkpoint.path if not checkpoint.gguf else None, overwrite)
    checkpoint.check(Skeleton(checkpoint, adapter, torch.device("cpu")).expected())
    if dry_run:
        return Conversion(plan, out, None)

    texts = read_texts([BUILT_IN] if calibration is None else calibration)
    tokens = windows(texts, checkpoint.tokenizer(), SEQ_LEN, calibration_tokens) if texts else None
    compute = pick_device(device)
    for done, total in checkpoint.finite():
        progress("checking", done, total)
    config = converted_config(checkpoint, adapter, plan, stored, alignment=base == "joint")
    target, fitted = empty_target(config), []
    with new_folder(out) as partial:
        writer = ShardWriter(partial, tensor_shapes(target, stored), max_shard_size)
        for name in writer.shapes:
            if not name.startswith(adapter.layer_path + "."):
                writer.add(name, checkpoint.tensor(name))
        for layer in calibrated_layers(checkpoint, adapter, geometry, tokens, compute):
            prefix = adapter.module(layer.index)
            factors, attention = convert_layer(layer, plan.layers[layer.index], base, adapter, geometry,
                                               target.get_submodule(prefix.rstrip(".")), refit)
            for name, tensor in attention.items():
                writer.add(prefix + name, check_finite(prefix + name, tensor.to(stored)))
            for name in writer.shapes:
                if name.startswith(f"{adapter.layer_path}.{layer.index}.") and name.removeprefix(prefix) not in attention:
                    writer.add(name, checkpoint.tensor(name))
            fitted.append(factors)
            progress("converting", layer.index + 1, geometry.layers)
        writer.finish()
        record = conversion_record(checkpoint, plan, fitted, options, texts, tokens, checkpoint.hash(),
                                   seconds=time.perf_counter() - started, peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        write_companions(partial, checkpoint, adapter, config, record, out)
    return Conversion(plan, out, record)


def open_model(model: str) -> tuple[Checkpoint, Adapter]:
    """Open a checkpoint and find its adapter. Raises LrkvError, also for weights that are already quantised."""
    checkpoint = open_checkpoint(model)
    adapter = adapter_for(checkpoint.config)
    if getattr(checkpoint.config, "quantization_config", None):
        raise LrkvError(f"{model} holds quantised weights", "convert the full-precision checkpoint, then quantise")
    return checkpoint.with_prefix(adapter.prefix), adapter


def stored_dtype(checkpoint: Checkpoint, adapter: Adapter, dtype: str) -> torch.dtype:
    """The output's dtype: as asked, or that of the source's attention output projection."""
    if dtype != "auto":
        return pick_dtype(dtype)
    names = [n for n in checkpoint.tensors if n.startswith(adapter.module(0)) and n.endswith("weight")]
    return checkpoint.shape_dtype(names[0])[1] if names else torch.float32


def empty_target(config) -> PreTrainedModel:
    """The converted model's own class, built without memory: its names and shapes are what must be written."""
    with init_empty_weights(include_buffers=False):
        return FAMILIES[config.model_type.removeprefix("lrkv_")][2](config).eval().requires_grad_(False)


def tensor_shapes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a model's checkpoint; tied ones stand once."""
    tied = set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    return {name: (tuple(p.shape), dtype) for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}


def convert_layer(layer: CalibratedLayer, plan: LayerPlan, base: str, adapter: Adapter, geometry: Geometry, attention: nn.Module,
                  refit: bool) -> tuple[tuple[Factors, Factors], dict[str, Tensor]]:
    """Factors of keys and values of one layer, and the tensors of its converted attention module by their names in it (float64).

    attention: the module they belong to; it is filled for the refit and emptied again.
    """
    weights = layer.weights
    keys = BASES[base](weights.W_K, layer.metrics.keys, plan.key_width, plan.key_rank, rotary=geometry.rotary)
    values = BASES[base](weights.W_V, layer.metrics.values, plan.value_width, plan.value_rank)
    if keys.gauge is not None:              # q (k gauge)^T = (q gauge^T) k^T
        weights = weights.replace(W_Q=torch.einsum("hgDe,hfe->hgDf", weights.W_Q, keys.gauge),
                                  b_Q=None if weights.b_Q is None else torch.einsum("hge,hfe->hgf", weights.b_Q, keys.gauge))
    if values.gauge is not None:            # (v gauge) W_O = v (gauge W_O)
        weights = weights.replace(W_O=torch.einsum("hef,hgfD->hgeD", values.gauge, weights.W_O))
    factored = side_tensors("keys", keys, weights.b_K) | side_tensors("values", values, weights.b_V)
    if refit and layer.inputs and max(keys.error, values.error) > NOTHING_LOST:
        state = {name: tensor.float() for name, tensor in (adapter.join(weights) | factored).items()}
        attention.load_state_dict(state, strict=False, assign=True)
        for name, parameter in attention.named_parameters():        # what stays on meta is the output's bias, which the refit never sees
            if parameter.is_meta:
                attention.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], nn.Parameter(
                    torch.zeros(parameter.shape, device=weights.W_O.device), requires_grad=False))
        weights = weights.replace(W_O=refit_output(layer, attention, adapter.output, weights.W_O))
        attention.to("meta")
    return (keys, values), adapter.join(weights) | factored


def side_tensors(side: str, factors: Factors, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one `LowRankHeads` module, by their names in the attention module. A bias b becomes b gauge^-1."""
    tensors = {}
    if factors.W_shared.shape[1]:
        tensors["W_shared.weight"] = factors.W_shared.T                                     # (m, D)
        if factors.C is not None:
            tensors["C"] = factors.C                                                        # (H, m, d)
    if factors.U.shape[2]:
        tensors["U.weight"] = factors.U.transpose(1, 2).reshape(-1, factors.U.shape[1])     # (H r, D)
        tensors["B"] = factors.B                                                            # (H, d, r)
    if bias is not None:
        tensors["bias"] = bias if factors.gauge is None else torch.linalg.solve(factors.gauge.mT, bias.unsqueeze(-1)).squeeze(-1)
    return {f"{side}.{name}": tensor for name, tensor in tensors.items()}
