"""The story of a conversion:

    checkpoint --> sites --observe--> metrics --fit--> factors --writer--> model folder

Layer by layer throughout, and every finished step lies in a Store inside the unfinished folder, so
that a killed conversion goes on from there.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .device import give_back_memory, peak_memory, pick_device
from .errors import LrkvError
from .examples.example import digest
from .fit.layer import fit_site, found_in
from .folder.companions import (
    FIELDS,
    add_found,
    conversion_record,
    converted_config,
    version,
    write_companions,
)
from .folder.places import folder_to_make
from .folder.store import Store
from .folder.target import empty_target
from .folder.writer import ShardWriter, check_output, check_shard_size, new_folder
from .format import Record
from .observe.calibrate import solvable
from .plan.allocate import allocate
from .plan.curves import predicted_kl
from .plan.options import Options
from .plan.shapes import Plan
from .plan.spend import Budget
from .source import check_finite
from .study import Progress, Study

# of what calibration leaves for the fit: one more when it changes, so that no half of an older one
# is gone on with
STORE_FORMAT = 7


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or would do in a dry run.

    plans: by kind of attention ("self", "cross"); out: the folder; record: what stands in its
    lrkv.json, None in a dry run; notices: what was found in the source and does no harm, a line
    each; forms: in a dry run of a budget of codes what each form of keys would take, by kind and by
    name.
    """

    plans: dict[str, Plan]
    out: Path
    record: Record | None
    notices: list[str] = field(default_factory=list)
    forms: dict[str, dict[str, Plan]] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan of self-attention, or of what is converted in its place."""
        return next(iter(self.plans.values()))


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
    clock, out, asked = Clock(), folder_to_make(out), Options(**options)
    study = Study(model, asked.kinds, progress)
    asked = asked.for_family(study.family)
    checkpoint, stored = study.checkpoint, study.stored_dtype(asked.dtype)
    asked.check(study.sites, study.config)
    check_shard_size(asked.max_shard_size)
    plans = uniform_plans(study, asked, stored)
    if not dry_run:
        check_output(out, checkpoint.path if not checkpoint.gguf else None, overwrite)
    study.build(pick_device(device))
    if dry_run and plans:
        return Conversion(plans, out, None, checkpoint.notices)
    material = study.gather(asked.calibration, asked.tokens_of(study.family))
    with clock("load"):
        study.check(stored)
    with clock("calibrate"):
        study.read()
    if study.examples is None:
        lost = [] if dry_run else checkpoint.lost_tokenizer()
        asked, notices = without_gradient(study, asked)
        checkpoint.notices = [*checkpoint.notices, *lost, *notices]
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
            store = Store(Path(folder), {})
            study.observe({asked.metric}, store, for_refit=False)
            plans = plan_budgets(study, asked, stored, store)
            forms = {kind: plans_by_form(study, asked, stored, store, kind) for kind in plans}
            return Conversion(plans, out, None, checkpoint.notices, forms)
    with new_folder(out, fingerprint(study, asked, stored)) as (folder, store):
        with clock("calibrate"):
            study.observe({asked.metric}, store, for_refit=asked.refit)
        with clock("fit"):
            plans = plans or plan_budgets(study, asked, stored, store)
        config = converted_config(checkpoint, study.family, plans, stored, asked.base)
        errors = write_weights(study, plans, config, stored, store, asked, folder, clock)
        with clock("write"):
            sha256 = checkpoint.hash()
        kinds = {"attention": ",".join(study.kinds)} if study.family.encoder else {}
        record = conversion_record(
            checkpoint,
            plans,
            errors,
            asked.record() | kinds,
            material.record(study.examples),
            sha256,
            clock.total,
            clock.seconds,
            peak_memory(),
        )
        write_companions(folder, checkpoint, study.family, config, record, out.name)
    return Conversion(plans, out, record, checkpoint.notices)


class Clock:
    """Seconds spent in each stage."""

    def __init__(self):
        self.started = time.perf_counter()
        self.seconds = {"load": 0.0, "calibrate": 0.0, "fit": 0.0, "write": 0.0}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def without_gradient(study: Study, options: Options) -> tuple[Options, list[str]]:
    """The metric where there is no text, hence no gradient of the loss, and a notice of it. Where
    keys are normalised, queries say nothing of how keys should be fitted.
    """
    if options.metric != "fisher":
        return options, []
    normed = any(site.geometry.key_norm for site in study.sites)
    options = replace(options, metric="plain" if normed else "attention")
    used = f"without calibration there is no gradient: fitted in the {options.metric} metric"
    return options, [used]


def uniform_plans(study: Study, options: Options, stored: torch.dtype) -> dict[str, Plan]:
    """The plan of each kind of attention where it is the same in every layer; {} where budgets wait
    for calibration. Raises LrkvError for shapes and budgets that cannot be.
    """
    plans = {
        kind: options.spend.ahead(sites, study.layers, stored.itemsize, options)
        for kind, sites in study.by_kind.items()
    }
    return {kind: plan for kind, plan in plans.items() if plan is not None}


def plan_budgets(
    study: Study, options: Options, stored: torch.dtype, store: Store
) -> dict[str, Plan]:
    """Spend the byte budget of each kind of attention by the loss curves of its modules, in the
    form of keys asked for, or in the one of which least is lost. Raises LrkvError for a budget
    below the smallest plan.
    """
    plans = {}
    for kind, sites in study.by_kind.items():
        names = options.forms_for(sites, study.config)
        found = spent(study, options, stored, store, kind, names)
        plans[kind] = min(found.values(), key=lambda plan: plan.predicted_kl or 0.0)
    return plans


def plans_by_form(
    study: Study, options: Options, stored: torch.dtype, store: Store, kind: str
) -> dict[str, Plan]:
    """The same budget in every form of keys that goes with this kind of attention, by name; {}
    where there is one, or nothing is codes.
    """
    names = options.coded_forms(study.by_kind[kind], study.config)
    return spent(study, options, stored, store, kind, names) if len(names) > 1 else {}


def spent(
    study: Study,
    options: Options,
    stored: torch.dtype,
    store: Store,
    kind: str,
    names: Sequence[str],
) -> dict[str, Plan]:
    """The budget of one kind of attention in forms of keys of these names, where it goes so far.
    Raises LrkvError where it does in none.
    """
    plans, refusal, budget = {}, None, options.spend
    assert isinstance(budget, Budget)
    for name in names:
        curves = study.curves(
            kind, options.metric, budget.caps(name), name, store, budget.bits, budget.group_size
        )
        sites = study.by_kind[kind]
        try:
            plan = allocate(curves, sites, study.layers, stored.itemsize, budget.ratio, name)
        except LrkvError as error:
            refusal = error
        else:
            plans[name] = replace(plan, predicted_kl=predicted_kl(curves, plan))
    if refusal is not None and not plans:
        raise refusal
    return plans


def write_weights(
    study: Study,
    plans: dict[str, Plan],
    config,
    stored: torch.dtype,
    store: Store,
    options: Options,
    folder: Path,
    clock: Clock,
) -> list[dict[str, dict[str, float]]]:
    """Fit layer after layer and write each as it is done; returns the fit errors of every layer, by
    kind of attention. What fits find beside tensors is put into the config.
    """
    # a model writes into its config what it runs with
    target, skeleton, errors = empty_target(deepcopy(config)), study.skeleton, []
    state, stack = target.state_dict(), f"{study.family.any.layer_path}."
    shapes = {name: (tuple(state[name].shape), stored) for name in skeleton.names(target)}
    writer = ShardWriter(folder, shapes, options.max_shard_size)
    with clock("write"):
        for name in shapes:
            if not name.startswith(stack):
                writer.add(name, check_finite(name, skeleton.tensor(name), stored))
    for i in range(study.layers):
        if f"fitted-{i}" not in store:
            write_layer(study, plans, stored, store, options, target, writer, i, clock)
            give_back_memory()
        else:  # by an earlier run, which was killed: its tensors are in place
            for name in shapes:
                if name.startswith(f"{stack}{i}."):
                    writer.done(name)
        fitted = store.load(f"fitted-{i}")
        errors.append({kind: site["errors"] for kind, site in fitted.items()})
        for kind, site in fitted.items():
            add_found(getattr(config, FIELDS[kind]), i, study.layers, site["found"])
        study.progress("converting", i + 1, study.layers)
    writer.finish()
    return errors


def write_layer(
    study: Study,
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
    done, fitted = {}, {}
    with clock("fit"):
        for site in study.sites:
            if site.layer == i:
                planned = next(p for p in plans[site.kind].sites if p.layer == i)
                seen, attention = study.seen(store, site), target.get_submodule(site.path)
                errors, tensors = fit_site(
                    seen,
                    seen.metrics(options.metric),
                    planned.keys,
                    planned.values,
                    options.base,
                    attention,
                    options.refit,
                )
                done[site.kind] = {"errors": errors, "found": found_in(attention)}
                fitted |= {f"{site.path}.{name}": tensor for name, tensor in tensors.items()}
                del seen
    with clock("write"):
        for name in writer.shapes:
            if name.startswith(f"{study.family.any.layer_path}.{i}."):
                tensor = fitted[name] if name in fitted else study.skeleton.tensor(name)
                writer.add(name, check_finite(name, tensor, stored))
        if "shards" not in store:
            store.save("shards", writer.sizes)
        store.save(f"fitted-{i}", done)
        store.remove(f"layer-{i}")


def fingerprint(study: Study, options: Options, stored: torch.dtype) -> dict:
    """What a half-finished conversion depends on: with any of it different, it is begun anew."""
    checkpoint = study.checkpoint
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    return {
        "files": files,
        "config": checkpoint.config.to_dict(),
        "options": asdict(options),
        "dtype": str(stored),
        "examples": digest(study.examples),
        "versions": [
            STORE_FORMAT,
            version("lrkv-convert"),
            torch.__version__,
            transformers.__version__,
        ],
    }
