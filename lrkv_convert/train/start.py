"""Everything that a run begins with: the two models, the optimiser, the losses before training."""

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from ..evaluate.load import load_model
from ..families import Family, Site
from ..modeling import auto_class
from .checkpoint import load_trained, only_trained
from .data import Data
from .loop import Trainer
from .objective import Objective
from .optimise import MuonAdamW, groups, schedule
from .options import Options
from .run import Run
from .student import choose_trained, converted_sites, set_precision
from .validation import validation_loss

# every process holds the whole model
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def new_trainer(
    model: Path,
    family: Family,
    teacher: str | None,
    kl_weight: float,
    data: Data,
    options: Options,
    accelerator: Accelerator,
) -> Trainer:
    """All that a step needs. model: the converted folder; teacher: the original, or None. Raises
    LrkvError for models that cannot be loaded.
    """
    steps = options.steps(data.tokens_per_example)
    student, optimizer, sites = new_student(model, family, options, accelerator)
    rates = schedule(optimizer.optimizer, options, steps)
    accelerator.register_for_checkpointing(rates)
    if accelerator.distributed_type in PLAIN:
        accelerator.register_save_state_pre_hook(only_trained)
        accelerator.register_load_state_pre_hook(load_trained)
    original = None
    if teacher is not None:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        original = load_model(teacher, accelerator.device, dtype, auto_class(family.model_type))
        original.requires_grad_(False)
    objective = Objective(
        accelerator,
        student,
        original,
        [site.path for site in sites],
        kl_weight,
        options.match_attention,
    )
    begin_tracking(accelerator, options)
    return Trainer(accelerator, student, objective, optimizer, rates, data, options, steps)


def new_student(
    model: Path, family: Family, options: Options, accelerator: Accelerator
) -> tuple[PreTrainedModel, AcceleratedOptimizer, list[Site]]:
    """The model that trains and its optimiser, as accelerate prepares them, and its converted
    attention.
    """
    student = load_model(str(model), torch.device("cpu"), auto=auto_class(family.model_type))
    sites = converted_sites(family, student.config)
    choose_trained(student, sites, options.train)
    small = accelerator.mixed_precision == "bf16" and accelerator.distributed_type in PLAIN
    set_precision(student, family, frozen=torch.bfloat16 if small else torch.float32)
    if options.gradient_checkpointing:
        # its newer name
        enable = getattr(
            student, "activation_checkpointing_enable", student.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    found = groups(student, options.optimizer)
    return *accelerator.prepare(student.train(), MuonAdamW(found, options)), sites


def begin_tracking(accelerator: Accelerator, options: Options) -> None:
    """Tell trackers what is asked for."""
    plain = {n: v for n, v in asdict(options).items() if isinstance(v, (int, float, str))}
    with redirect_stdout(sys.stderr):  # trackers greet, and stdout is the result's
        accelerator.init_trackers("lrkv-heal", config=plain)


def begin(
    trainer: Trainer, run: Run, resume: bool, stage: Callable[[str], None]
) -> tuple[dict[str, float], int]:
    """(validation losses before training, the step to begin with), of a resumed run those that its
    last checkpoint knows.
    """
    if resume:
        state = run.load()
        return state["baseline"], state["step"]
    stage("measuring")
    accelerator, objective = trainer.accelerator, trainer.objective
    baseline = {"converted": validation_loss(accelerator, trainer.student, trainer.data)}
    ratio = {}
    if objective.teacher is not None:
        baseline["original"] = validation_loss(accelerator, objective.teacher, trainer.data)
        ratio = {
            "validation_ratio": math.exp(baseline["converted"] - baseline["original"]),
            "original_nll": baseline["original"],
        }
        if not objective.kl_weight and not objective.match_attention:
            objective.teacher = None  # it was here to be compared with
    run.note({"step": 0, "tokens": 0, "validation_nll": baseline["converted"], **ratio})
    stage(
        f"before training: held-out perplexity {math.exp(baseline['converted']):.3f}"
        + (f", ×{ratio['validation_ratio']:.4f} of the original's" if ratio else "")
        + f"; {trainer.steps:,} steps"
    )
    return baseline, 0
