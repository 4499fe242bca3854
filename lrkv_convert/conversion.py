"""The story of a conversion:

    checkpoint --adapter--> per-head weights --calibrate--> metrics --factorise--> factors
    --writer--> model folder

Layer by layer throughout, and every finished step lies in a Store inside the unfinished folder, so
that a killed conversion goes on from there.
"""

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .device import give_back_memory, pick_device, pick_dtype
from .errors import LrkvError
from .evaluate.load import load_model
from .examples.text import (
    BUILT_IN,
    SELF,
    Text,
    check_ids,
    read_texts,
    sample_text,
    window_length,
    windows,
)
from .families import Adapter, AttentionWeights, Geometry, adapter_for, family_with_encoder
from .fit.layer import convert_layer, empty_target, tensor_shapes
from .fit.metric import LayerMetrics
from .folder.companions import conversion_record, converted_config, version, write_companions
from .folder.places import folder_to_make
from .folder.store import Store
from .folder.writer import ShardWriter, check_output, new_folder
from .observe.calibrate import calibrate, calibrated_layer, solvable
from .observe.sensitivity import gradient_rows, head_moments
from .plan.allocate import allocate, check_floor
from .plan.curves import survey, width_caps
from .plan.options import Options
from .plan.shapes import Plan
from .source import Checkpoint, check_finite, open_checkpoint
from .source.names import describe, placed
from .source.skeleton import Skeleton

Progress = Callable[[str, int, int], None]  # (stage, done, total)
# of what calibration leaves for the fit: one more when it changes, so that no half of an older one
# is gone on with
STORE_FORMAT = 2


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do in a dry run: the plan, and the record that stands in
    lrkv.json (None in a dry run). plans: of an encoder-decoder those of all kinds of attention that
    are converted, of which `plan` is the first; notices: what was found in the source and does no
    harm, a line each.
    """

    plan: Plan
    out: Path
    record: dict | None
    plans: dict[str, Plan] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@solvable()
def convert(
    model: str,
    out: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda *_: None,
    **options,
) -> Conversion:
    """Convert `model` (folder, .gguf file or hub id) to LRKV and write the folder `out`; `options`
    are the fields of `Options`.

    device: "auto", "cpu", "cuda"; overwrite: replace an earlier converted folder; dry_run: plan
    only. Raises LrkvError for anything that cannot be converted exactly as asked; then nothing is
    left behind. Killed or interrupted, the same call goes on from the last finished layer and ends
    with the same weights.
    """
    clock, out, options = Clock(), folder_to_make(out), Options(**options)
    checkpoint = open_checkpoint(model)
    if (family := family_with_encoder(checkpoint.config)) is not None:
        # a story of its own, in the words of this one
        from .seq2seq.conversion import convert_encoder_decoder

        return convert_encoder_decoder(
            unquantised(checkpoint),
            family,
            options,
            out,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    options.kinds(encoder_decoder=False)
    checkpoint, adapter = with_adapter(checkpoint)
    geometry, stored = (
        adapter.geometry(checkpoint.config),
        stored_dtype(checkpoint, adapter, options.dtype),
    )
    options.check(geometry, checkpoint.config)
    plan = options.uniform_plan(geometry, stored.itemsize)
    if plan is None:
        check_floor(
            geometry,
            width_caps(geometry, options.max_width_k, options.max_width_v),
            options.keys,
            options.budget,
        )
    if not dry_run:
        check_output(out, checkpoint.path if not checkpoint.gguf else None, overwrite)
    skeleton = Skeleton(checkpoint, adapter, pick_device(device))
    if dry_run and plan:
        return Conversion(plan, out, None, notices=checkpoint.notices)
    texts = gather_texts(options.calibration, options.tokens, model, skeleton)
    tokens = (
        windows(texts, checkpoint.tokenizer(), window_length(checkpoint.config), options.tokens)
        if texts
        else None
    )
    if tokens is not None:
        check_ids(tokens, checkpoint.config.vocab_size, model)
    elif not dry_run:
        checkpoint.notices = [*checkpoint.notices, *checkpoint.lost_tokenizer()]
    if tokens is None and options.metric == "fisher":
        # no text, no gradient: the record says what was used. Where keys are normalised, queries
        # say nothing of how keys should be fitted
        options = replace(options, metric="plain" if geometry.key_norm else "attention")
    with clock("load"):
        for done, total in checkpoint.finite(skeleton.expected(), stored):
            progress("checking", done, total)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
            store = Store(Path(folder), {})
            observe(skeleton, geometry, tokens, options.metric, store, progress, for_refit=False)
            return Conversion(
                plan_budget(skeleton, geometry, options, stored, store, progress),
                out,
                None,
                notices=checkpoint.notices,
            )
    with new_folder(out, fingerprint(checkpoint, options, tokens, stored)) as (folder, store):
        with clock("calibrate"):
            observe(
                skeleton, geometry, tokens, options.metric, store, progress, for_refit=options.refit
            )
        with clock("fit"):
            plan = plan or plan_budget(skeleton, geometry, options, stored, store, progress)
        errors = write_weights(skeleton, plan, stored, store, options, folder, clock, progress)
        with clock("write"):
            sha256 = checkpoint.hash()
        record = conversion_record(
            checkpoint,
            plan,
            errors,
            options.record(),
            texts,
            tokens,
            sha256,
            clock.total,
            clock.seconds,
            peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        write_companions(
            folder,
            checkpoint,
            adapter,
            converted_config(checkpoint, adapter, plan, stored, options.base),
            record,
            out.name,
        )
    return Conversion(plan, out, record, notices=checkpoint.notices)


class Clock:
    """Seconds spent in each stage."""

    def __init__(self):
        self.started, self.seconds = (
            time.perf_counter(),
            {
                "load": 0.0,
                "calibrate": 0.0,
                "fit": 0.0,
                "write": 0.0,
            },
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def gather_texts(
    calibration: list[str] | None, tokens: int, model: str, skeleton: Skeleton
) -> list[Text]:
    """The calibration texts. Raises LrkvError for one that cannot be read."""
    given = [BUILT_IN] if calibration is None else calibration
    texts = read_texts([name for name in given if name != SELF])
    if SELF in given:  # the only step that holds the whole model in memory
        texts.append(
            sample_text(
                load_model(model, skeleton.device),
                skeleton.checkpoint.tokenizer(),
                tokens // len(given),
            )
        )
    return texts


def observe(
    skeleton: Skeleton,
    geometry: Geometry,
    tokens: Tensor | None,
    metric: str,
    store: Store,
    progress: Progress,
    for_refit: bool = True,
) -> None:
    """Calibration: what every layer sees and, for the Fisher metric, what the loss minds. Nothing
    without text.
    """
    if tokens is None:
        return
    rows = gradient_rows(tokens) if metric == "fisher" else None
    calibrate(
        skeleton,
        geometry,
        tokens,
        {metric},
        store,
        rows,
        for_refit,
        lambda done, total: progress("calibrating", done, total),
    )
    if rows is not None:
        head_moments(
            skeleton,
            geometry,
            tokens[rows],
            store,
            lambda done, total: progress("gradients", done, total),
        )


def plan_budget(
    skeleton: Skeleton,
    geometry: Geometry,
    options: Options,
    stored: torch.dtype,
    store: Store,
    progress: Progress,
) -> Plan:
    """Spend the byte budget by the loss curves of every layer. Raises LrkvError for a budget below
    the smallest plan.
    """
    looks = [
        partial(survey_layer, skeleton, geometry, options.metric, store, i)
        for i in range(geometry.layers)
    ]
    curves = survey(
        looks,
        geometry,
        width_caps(geometry, options.max_width_k, options.max_width_v),
        options.keys,
        store,
        lambda done: progress("planning", done, geometry.layers),
    )
    return allocate(curves, geometry, stored.itemsize, options.budget, options.keys)


def survey_layer(
    skeleton: Skeleton, geometry: Geometry, metric: str, store: Store, i: int
) -> tuple[AttentionWeights, LayerMetrics]:
    layer = calibrated_layer(skeleton, store, i)
    return layer.weights, layer.metrics(geometry, metric)


def write_weights(
    skeleton: Skeleton,
    plan: Plan,
    stored: torch.dtype,
    store: Store,
    options: Options,
    folder: Path,
    clock: Clock,
    progress: Progress,
) -> list[dict[str, float]]:
    """Fit layer after layer and write each as it is done; returns the fit errors."""
    checkpoint, adapter, geometry = skeleton.checkpoint, skeleton.adapter, plan.geometry
    target, errors = (
        empty_target(converted_config(checkpoint, adapter, plan, stored, options.base)),
        [],
    )
    writer = ShardWriter(folder, tensor_shapes(target, stored), options.max_shard_size)
    with clock("write"):
        for tensor in writer.shapes:
            if not tensor.startswith(adapter.layer_path + "."):
                writer.add(tensor, check_finite(tensor, checkpoint.tensor(tensor), stored))
    for i in range(geometry.layers):
        if f"fitted-{i}" not in store:
            write_layer(skeleton, plan, stored, store, options, target, writer, i, clock)
            give_back_memory()
        else:  # by an earlier run, which was killed: its tensors are in place
            for tensor in writer.shapes:
                if tensor.startswith(f"{adapter.layer_path}.{i}."):
                    writer.done(tensor)
        errors.append(store.load(f"fitted-{i}"))
        progress("converting", i + 1, geometry.layers)
    writer.finish()
    return errors


def write_layer(
    skeleton: Skeleton,
    plan: Plan,
    stored: torch.dtype,
    store: Store,
    options: Options,
    target: PreTrainedModel,
    writer: ShardWriter,
    i: int,
    clock: Clock,
) -> None:
    """Fit layer i and write all of its tensors. target: the converted model, whose attention module
    is filled for a while.
    """
    adapter, prefix = skeleton.adapter, skeleton.adapter.module(i)
    with clock("fit"):
        layer = calibrated_layer(skeleton, store, i)
        errors, attention = convert_layer(
            layer,
            layer.metrics(plan.geometry, options.metric),
            plan,
            options.base,
            adapter,
            target.get_submodule(prefix.rstrip(".")),
            options.refit,
        )
    with clock("write"):
        for name, value in attention.items():
            writer.add(prefix + name, check_finite(prefix + name, value, stored))
        for name in writer.shapes:
            if (
                name.startswith(f"{adapter.layer_path}.{i}.")
                and name.removeprefix(prefix) not in attention
            ):
                writer.add(name, check_finite(name, skeleton.checkpoint.tensor(name), stored))
        if "shards" not in store:
            store.save("shards", writer.sizes)
        store.save(f"fitted-{i}", errors)
        store.remove(f"layer-{i}")


def fingerprint(
    checkpoint: Checkpoint, options: Options, tokens: Tensor | None, stored: torch.dtype
) -> dict:
    """What a half-finished conversion depends on: with any of it different, it is begun anew."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    return {
        "files": files,
        "config": checkpoint.config.to_dict(),
        "options": asdict(options),
        "dtype": str(stored),
        "tokens": (
            tokens if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        ),
        "versions": [
            STORE_FORMAT,
            version("lrkv-convert"),
            torch.__version__,
            transformers.__version__,
        ],
    }


def open_model(model: str) -> tuple[Checkpoint, Adapter]:
    """Open a checkpoint and find its adapter. Raises LrkvError, also for weights that are already
    quantised.
    """
    return with_adapter(open_checkpoint(model))


def with_adapter(checkpoint: Checkpoint) -> tuple[Checkpoint, Adapter]:
    adapter = adapter_for(checkpoint.config)
    checkpoint = unquantised(checkpoint)
    return placed(checkpoint, describe(checkpoint), adapter.stored), adapter


def unquantised(checkpoint: Checkpoint) -> Checkpoint:
    if getattr(checkpoint.config, "quantization_config", None):
        raise LrkvError(
            f"{checkpoint.source} holds quantised weights",
            "convert the full-precision checkpoint, then quantise",
        )
    return checkpoint


def stored_dtype(checkpoint: Checkpoint, adapter: Adapter, dtype: str) -> torch.dtype:
    """The output's dtype: as asked, or that of the source's first attention weight."""
    if dtype != "auto":
        return pick_dtype(dtype)
    names = [
        n for n in checkpoint.tensors if n.startswith(adapter.module(0)) and n.endswith("weight")
    ]
    return checkpoint.shape_dtype(names[0])[1] if names else torch.float32
