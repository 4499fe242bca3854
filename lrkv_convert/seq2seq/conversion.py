"""The story of an encoder-decoder's conversion: as conversion.py, of the two kinds of attention in
its decoder, each with a plan of its own.

    checkpoint --adapters--> per-head weights of self- and cross-attention --calibrate on
    examples--> metrics --factorise--> factors --> model folder
"""

import hashlib
import resource
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..conversion import Clock, Conversion, fingerprint, stored_dtype
from ..device import give_back_memory, pick_device
from ..errors import LrkvError
from ..evaluate.load import load_model
from ..examples.pairs import Corpus, read_pairs, read_speech
from ..examples.prepare import Tensors, prepare
from ..examples.reader import Reader
from ..examples.text import BUILT_IN, SELF
from ..families import EncoderDecoder, Geometry
from ..fit.layer import convert_layer, empty_target
from ..folder.companions import config_with, encoder_decoder_record, write_companions
from ..folder.store import Store
from ..folder.writer import ShardWriter, check_output, new_folder
from ..modeling import auto_class
from ..plan.allocate import allocate, check_floor
from ..plan.curves import survey, width_caps
from ..plan.options import TOKENS, Options
from ..plan.shapes import Plan
from ..source import Checkpoint, check_finite
from ..source.names import describe, placed
from .calibrate import calibrate, calibrated_layer, gradient_rows, head_moments
from .skeleton import StackSkeleton

Progress = Callable[[str, int, int], None]  # (stage, done, total)
# of transcripts to calibrate on: about 20 minutes of speech, of which the encoder makes a thousand
# and a half positions each 30 s
SPEECH_TOKENS = 4096


def convert_encoder_decoder(
    checkpoint: Checkpoint,
    family: EncoderDecoder,
    options: Options,
    out: Path,
    *,
    device: str,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
) -> Conversion:
    """`conversion.convert` for a model with an encoder."""
    clock, kinds = Clock(), options.kinds(encoder_decoder=True)
    checkpoint = placed(checkpoint, describe(checkpoint, auto_class(family.any.model_type)))
    geometries = {kind: family.kinds[kind].geometry(checkpoint.config) for kind in kinds}
    stored, plans = stored_dtype(checkpoint, family.any, options.dtype), {}
    for kind, geometry in geometries.items():
        options.check(geometry, checkpoint.config)
        plans[kind] = options.uniform_plan(geometry, stored.itemsize)
        if plans[kind] is None:
            check_floor(
                geometry,
                width_caps(geometry, options.max_width_k, options.max_width_v),
                options.keys,
                options.budget,
            )
    if not dry_run:
        check_output(out, checkpoint.path, overwrite)
    skeleton = StackSkeleton(checkpoint, family, pick_device(device))
    checkpoint.check(skeleton.expected())
    planned = all(plans.values())
    if dry_run and planned:
        return Conversion(plans[kinds[0]], out, None, plans, checkpoint.notices)
    corpora = gather(options.calibration, family)
    with clock("load"):
        for done, total in checkpoint.finite(skeleton.expected(), stored):
            progress("checking", done, total)
    with clock("calibrate"):
        examples = (
            read(
                corpora,
                checkpoint,
                family,
                options,
                skeleton.device,
                lambda done, total: progress("writing", done, total),
            )
            if corpora
            else None
        )
    if examples is None and not dry_run:
        checkpoint.notices = [*checkpoint.notices, *checkpoint.lost_tokenizer()]
    if examples is None and options.metric == "fisher":
        # no examples, no gradient: the record says what was used
        options = replace(options, metric="attention")
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
            store = Store(Path(folder), {})
            observe(skeleton, kinds, examples, options.metric, store, progress, for_refit=False)
            plans = plan_budgets(skeleton, geometries, options, stored, store, progress)
            return Conversion(plans[kinds[0]], out, None, plans, checkpoint.notices)
    with new_folder(
        out, fingerprint(checkpoint, options, None, stored) | {"examples": digest(examples)}
    ) as (folder, store):
        with clock("calibrate"):
            observe(
                skeleton, kinds, examples, options.metric, store, progress, for_refit=options.refit
            )
        with clock("fit"):
            plans = (
                plans
                if planned
                else plan_budgets(skeleton, geometries, options, stored, store, progress)
            )
        errors = write_weights(skeleton, plans, stored, store, options, folder, clock, progress)
        with clock("write"):
            sha256 = checkpoint.hash()
        record = encoder_decoder_record(
            checkpoint,
            plans,
            errors,
            {**options.record(), "attention": ",".join(kinds)},
            corpora,
            examples,
            sha256,
            clock.total,
            clock.seconds,
            peak_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        write_companions(
            folder,
            checkpoint,
            family.any,
            encoder_decoder_config(checkpoint, family, plans, stored, options.base),
            record,
            out.name,
        )
    return Conversion(plans[kinds[0]], out, record, plans, checkpoint.notices)


def gather(calibration: list[str] | None, family: EncoderDecoder) -> list[Corpus]:
    """The calibration corpora: folders of speech, or pairs and texts. Raises LrkvError."""
    if calibration is None and family.speech:
        raise LrkvError(
            "a speech model is calibrated on speech, and none was given",
            "give --calibration FOLDER of .wav files, or --calibration none for the weights alone",
        )
    given = [BUILT_IN] if calibration is None else calibration
    if SELF in given:
        raise LrkvError(
            "an encoder-decoder reads something before it writes: self is no calibration for it",
            "give sources; where targets are missing, it writes them itself",
        )
    return [(read_speech if family.speech else read_pairs)(path) for path in given]


def read(
    corpora: list[Corpus],
    checkpoint: Checkpoint,
    family: EncoderDecoder,
    options: Options,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Tensors:
    """The calibration examples as tensors; where targets are missing, this is the only step that
    holds the whole model in memory.
    """
    reader = Reader(
        checkpoint.path,
        family,
        checkpoint.tokenizer(),
        checkpoint.config,
        checkpoint.generation_config(),
    )
    tokens = options.calibration_tokens or (SPEECH_TOKENS if family.speech else TOKENS)
    return prepare(
        corpora,
        reader,
        tokens,
        lambda: load_model(
            str(checkpoint.path), device, torch.float32, auto_class(family.any.model_type)
        ),
        progress,
    )


def digest(examples: Tensors | None) -> str | None:
    """sha256 of what is read and written."""
    if examples is None:
        return None
    found = hashlib.sha256()
    for tensor in (*examples.sources, *examples.sequences):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def observe(
    skeleton: StackSkeleton,
    kinds: Collection[str],
    examples: Tensors | None,
    metric: str,
    store: Store,
    progress: Progress,
    for_refit: bool = True,
) -> None:
    """Calibration: what every layer sees and, for the Fisher metric, what the loss minds. Nothing
    without examples.
    """
    if examples is None:
        return
    rows = gradient_rows(examples.inputs) if metric == "fisher" else []
    calibrate(
        skeleton,
        kinds,
        examples.sources,
        examples.inputs,
        {metric},
        store,
        rows,
        for_refit,
        lambda done, total: progress("calibrating", done, total),
    )
    if rows:
        head_moments(
            skeleton, kinds, rows, store, lambda done, total: progress("gradients", done, total)
        )


def plan_budgets(
    skeleton: StackSkeleton,
    geometries: dict[str, Geometry],
    options: Options,
    stored: torch.dtype,
    store: Store,
    progress: Progress,
) -> dict[str, Plan]:
    """Spend each kind's byte budget by the loss curves of every layer. Raises LrkvError for a
    budget below the smallest plan.
    """
    plans = {}
    for n, (kind, geometry) in enumerate(geometries.items()):
        looks = [
            partial(survey_layer, skeleton, kind, geometry, options.metric, store, i)
            for i in range(geometry.layers)
        ]
        curves = survey(
            looks,
            geometry,
            width_caps(geometry, options.max_width_k, options.max_width_v),
            options.keys,
            store,
            lambda done: progress(
                "planning", n * geometry.layers + done, len(geometries) * geometry.layers
            ),
            label=f"curves-{kind}",
        )
        plans[kind] = allocate(curves, geometry, stored.itemsize, options.budget, options.keys)
    return plans


def survey_layer(
    skeleton: StackSkeleton, kind: str, geometry: Geometry, metric: str, store: Store, i: int
):
    layer = calibrated_layer(skeleton, kind, store, i)
    return layer.weights, layer.metrics(geometry, metric)


def encoder_decoder_config(
    checkpoint: Checkpoint,
    family: EncoderDecoder,
    plans: dict[str, Plan],
    dtype: torch.dtype,
    base: str,
):
    """The converted model's config: `lrkv` and `lrkv_cross`, None for a kind that stays as it
    was.
    """
    spec = {kind: plan.lrkv_config(base) for kind, plan in plans.items()}
    return config_with(
        checkpoint,
        family.any.model_type,
        dtype,
        lrkv=spec.get("self"),
        lrkv_cross=spec.get("cross"),
    )


def write_weights(
    skeleton: StackSkeleton,
    plans: dict[str, Plan],
    stored: torch.dtype,
    store: Store,
    options: Options,
    folder: Path,
    clock: Clock,
    progress: Progress,
) -> list[dict[str, dict[str, float]]]:
    """Fit layer after layer and write each as it is done; returns the fit errors by kind."""
    checkpoint, family = skeleton.checkpoint, skeleton.family
    target, errors = (
        empty_target(encoder_decoder_config(checkpoint, family, plans, stored, options.base)),
        [],
    )
    state, buffers = target.state_dict(), dict(target.named_buffers())
    shapes = {
        name: (tuple(state[name].shape), stored)
        for name in skeleton.names(state)
        if name not in buffers or name in checkpoint.tensors
    }
    writer, layers = (
        ShardWriter(folder, shapes, options.max_shard_size),
        family.any.geometry(checkpoint.config).layers,
    )
    at = lambda i: f"{family.any.layer_path}.{i}."
    with clock("write"):
        for name in shapes:
            if not name.startswith(f"{family.any.layer_path}."):
                writer.add(name, check_finite(name, skeleton.tensor(name), stored))
    for i in range(layers):
        if f"fitted-{i}" not in store:
            write_layer(skeleton, plans, stored, store, options, target, writer, i, clock)
            give_back_memory()
        else:  # by an earlier run, which was killed: its tensors are in place
            for name in shapes:
                if name.startswith(at(i)):
                    writer.done(name)
        errors.append(store.load(f"fitted-{i}"))
        progress("converting", i + 1, layers)
    writer.finish()
    return errors


def write_layer(
    skeleton: StackSkeleton,
    plans: dict[str, Plan],
    stored: torch.dtype,
    store: Store,
    options: Options,
    target: PreTrainedModel,
    writer: ShardWriter,
    i: int,
    clock: Clock,
) -> None:
    """Fit the attention of layer i and write all tensors of the layer. target: the converted model,
    whose attention modules are filled for a while.
    """
    family, errors, fitted = skeleton.family, {}, {}
    with clock("fit"):
        for kind, plan in plans.items():
            layer = calibrated_layer(skeleton, kind, store, i)
            prefix = family.kinds[kind].module(i)
            errors[kind], tensors = convert_layer(
                layer,
                layer.metrics(plan.geometry, options.metric),
                plan,
                options.base,
                family.kinds[kind],
                target.get_submodule(prefix.rstrip(".")),
                options.refit,
            )
            fitted |= {prefix + name: tensor for name, tensor in tensors.items()}
    with clock("write"):
        for name in writer.shapes:
            if name.startswith(f"{family.any.layer_path}.{i}."):
                writer.add(
                    name,
                    check_finite(
                        name, fitted[name] if name in fitted else skeleton.tensor(name), stored
                    ),
                )
        if "shards" not in store:
            store.save("shards", writer.sizes)
        store.save(f"fitted-{i}", errors)
        store.remove(f"layer-{i}")
