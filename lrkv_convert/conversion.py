"""The story of a conversion:

    checkpoint --adapter--> per-head weights --calibrate--> metrics --factorise--> factors --writer--> model folder
"""
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import Adapter, Geometry, adapter_for
from .allocate import allocate
from .calibrate import BUILT_IN, CalibratedLayer, Skeleton, Text, calibrated_layers, read_texts, window_length, windows
from .checkpoint import Checkpoint, check_finite, open_checkpoint
from .device import pick_device, pick_dtype
from .errors import LrkvError
from .factorise import BASES, UNALIGNED, Factors, check_shape
from .metrics import METRICS, LayerMetrics, layer_metrics
from .modeling import FAMILIES
from .plan import LayerPlan, Plan, uniform_plan
from .refit import NOTHING_LOST, refit_output
from .report import converted_config, conversion_record, write_companions
from .sensitivity import head_moments
from .survey import survey, width_caps
from .writer import ShardWriter, check_output, new_folder

Progress = Callable[[str, int, int], None]      # (stage, done, total)
Measure = Callable[[CalibratedLayer], LayerMetrics]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do in a dry run: the plan, and the record that stands in lrkv.json (None in a dry run)."""

    plan: Plan
    out: Path
    record: dict | None


def convert(model: str, out: str | Path, *, cache_ratio: float | None = None, rank: int | None = None, rank_k: int | None = None,
            rank_v: int | None = None, base_width: int | None = None, base_width_k: int | None = None, base_width_v: int | None = None,
            max_width_k: int | None = None, max_width_v: int | None = None, base: str = "joint", metric: str = "fisher", refit: bool = True,
            calibration: list[str] | None = None, calibration_tokens: int = 16384, dtype: str = "auto", device: str = "auto",
            max_shard_size: int | str = "5GB", overwrite: bool = False, force: bool = False, dry_run: bool = False, recipe: str | None = None,
            progress: Progress = lambda *_: None) -> Conversion:
    """Convert `model` (folder, .gguf file or hub id) to LRKV and write the folder `out`.

    cache_ratio: byte budget, as a share of the original cache, spent over layers, keys and values where the loss minds most; max_width_k,
    max_width_v: how wide its bases may be (default: one head for keys under RoPE, four otherwise). rank, rank_k, rank_v: the same residual rank
    in every layer instead; base_width, base_width_k, base_width_v: width of the base then (default: one head). None of them: half the cache.
    base: how the base is found (factorise.py); metric: in which norm (metrics.py); refit: correct W_O in closed form afterwards (needs
    calibration text); calibration: text files or folders, [] for none, None for the text that ships with the package; dtype: of the output,
    "auto" keeps the source's; device: "auto", "cpu", "cuda"; force: allow a cache that does not shrink; recipe: name to record. Raises LrkvError
    for anything that cannot be converted exactly as asked; then nothing is left behind.
    """
    started, out = time.perf_counter(), Path(out)
    options = {"cache_ratio": cache_ratio, "rank": rank, "rank_k": rank_k, "rank_v": rank_v, "base_width": base_width, "base_width_k": base_width_k,
               "base_width_v": base_width_v, "max_width_k": max_width_k, "max_width_v": max_width_v, "base": base, "metric": metric, "refit": refit,
               "calibration": calibration, "calibration_tokens": calibration_tokens, "dtype": dtype, "force": force, "name": recipe}
    checkpoint, adapter = open_model(model)
    geometry, stored = adapter.geometry(checkpoint.config), stored_dtype(checkpoint, adapter, dtype)
    for value, known, name in ((base, BASES, "base"), (metric, METRICS, "metric")):
        if value not in known:
            raise LrkvError(f"unknown {name} {value!r}", f"choose from {', '.join(known)}")
    uniform = {"rank": rank, "rank_k": rank_k, "rank_v": rank_v, "width": base_width, "width_k": base_width_k, "width_v": base_width_v}
    budget = choose_budget(cache_ratio, uniform, base, metric, calibration)
    if metric == "whitened" and calibration == []:
        raise LrkvError("the whitened metric is made of calibration text, and there is none", "give --calibration, or another --metric")
    if any(width is not None and width < 1 for width in (max_width_k, max_width_v)):
        raise LrkvError("the widest base is at least 1 wide", "see --max-width-k and --max-width-v")
    if calibration_tokens < 1:
        raise LrkvError(f"{calibration_tokens} calibration tokens are none", "give --calibration none for the weights alone")
    if budget is None and (max_width_k or max_width_v):
        raise LrkvError("the widest base is a limit of --cache-ratio, and there is none here", "with --rank, give --base-width")
    plan = uniform_plan(geometry, stored.itemsize, **uniform, force=force) if budget is None else None
    try:
        for m, r in ((plan.layers[0].key_width, plan.layers[0].key_rank), (plan.layers[0].value_width, plan.layers[0].value_rank)) if plan else ():
            check_shape(base, geometry.kv_heads, geometry.head_dim, m, r)
    except ValueError as error:
        raise LrkvError(str(error), "see --base-width and --rank") from error
    check_output(out, checkpoint.path if not checkpoint.gguf else None, overwrite)
    skeleton = Skeleton(checkpoint, adapter, pick_device(device))
    checkpoint.check(skeleton.expected())
    if dry_run and plan:
        return Conversion(plan, out, None)

    texts = read_texts([BUILT_IN] if calibration is None else calibration)
    tokens = windows(texts, checkpoint.tokenizer(), window_length(checkpoint.config), calibration_tokens) if texts else None
    if tokens is None and metric == "fisher":
        metric = options["metric"] = "attention"        # no text, no gradient: the record says what was used
    for done, total in checkpoint.finite():
        progress("checking", done, total)
    moments = None
    if metric == "fisher":
        moments = head_moments(skeleton, geometry, tokens, lambda done, total: progress("gradients", done, total))
    measure = lambda layer: layer_metrics(layer.weights, geometry, metric, layer.sums, moments and moments[layer.index])
    layers = calibrated_layers(skeleton, geometry, tokens)
    with tempfile.TemporaryDirectory(prefix="lrkv-") as spill:
        if plan is None:
            curves, layers = survey(layers, measure, geometry, width_caps(geometry, max_width_k, max_width_v), Path(spill),
                                    lambda done: progress("calibrating", done, geometry.layers))
            plan = allocate(curves, geometry, stored.itemsize, budget)
            if dry_run:
                return Conversion(plan, out, None)
        record = write(checkpoint, adapter, plan, stored, layers, measure, options, texts, tokens, out, max_shard_size, started, progress)
    return Conversion(plan, out, record)


def write(checkpoint: Checkpoint, adapter: Adapter, plan: Plan, stored: torch.dtype, layers: Iterator[CalibratedLayer], measure: Measure, options: dict,
          texts: list[Text], tokens: Tensor | None, out: Path, max_shard_size: int | str, started: float, progress: Progress) -> dict:
    """Fit layer after layer and write each as it is done; returns the record. The folder is there when all of it is."""
    config = converted_config(checkpoint, adapter, plan, stored, alignment=options["base"] not in UNALIGNED)
    target, fitted = empty_target(config), []
    with new_folder(out) as partial:
        writer = ShardWriter(partial, tensor_shapes(target, stored), max_shard_size)
        for name in writer.shapes:
            if not name.startswith(adapter.layer_path + "."):
                writer.add(name, checkpoint.tensor(name))
        for layer in layers:
            prefix = adapter.module(layer.index)
            factors, attention = convert_layer(layer, measure(layer), plan.layers[layer.index], options["base"], adapter, plan.geometry,
                                               target.get_submodule(prefix.rstrip(".")), options["refit"])
            for name, tensor in attention.items():
                writer.add(prefix + name, check_finite(prefix + name, tensor.to(stored)))
            for name in writer.shapes:
                if name.startswith(f"{adapter.layer_path}.{layer.index}.") and name.removeprefix(prefix) not in attention:
                    writer.add(name, checkpoint.tensor(name))
            fitted.append(factors)
            progress("converting", layer.index + 1, plan.geometry.layers)
        writer.finish()
        record = conversion_record(checkpoint, plan, fitted, options, texts, tokens, checkpoint.hash(),
                                   seconds=time.perf_counter() - started, peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        write_companions(partial, checkpoint, adapter, config, record, out)
    return record


def choose_budget(cache_ratio: float | None, uniform: dict, base: str, metric: str, calibration: list[str] | None) -> float | None:
    """The byte budget as a share of the original cache, or None for uniform ranks. Raises LrkvError for options that contradict one another."""
    given = [name for name, value in uniform.items() if value is not None]
    if cache_ratio is None:
        return 0.5 if not given and base == "joint" and metric == "fisher" and calibration != [] else None
    if given:
        raise LrkvError("a cache ratio and ranks or base widths exclude each other", "give --cache-ratio, or --rank with --base-width")
    if not 0 < cache_ratio < 1:
        raise LrkvError(f"a cache ratio of {cache_ratio} is out of range", "it lies between 0 and 1")
    if base != "joint":
        raise LrkvError(f"a cache ratio plans the joint base only, not {base}", "give --rank with the other bases")
    if metric != "fisher" or calibration == []:
        raise LrkvError("a cache ratio compares layers by the gradient of the loss, on calibration text", "give --rank without text or with other metrics")
    return cache_ratio


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


def convert_layer(layer: CalibratedLayer, metrics: LayerMetrics, plan: LayerPlan, base: str, adapter: Adapter, geometry: Geometry, attention: nn.Module,
                  refit: bool) -> tuple[tuple[Factors, Factors], dict[str, Tensor]]:
    """Factors of keys and values of one layer, and the tensors of its converted attention module by their names in it (float64).

    attention: the module they belong to; it is filled for the refit and emptied again.
    """
    weights = layer.weights
    keys = BASES[base](weights.W_K, metrics.keys, plan.key_width, plan.key_rank, rotary=geometry.rotary)
    values = BASES[base](weights.W_V, metrics.values, plan.value_width, plan.value_rank)
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
