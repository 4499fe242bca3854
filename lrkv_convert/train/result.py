"""What a finished run leaves: a converted folder with better weights, its history, its card and its
curve.
"""

import datetime
import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..device import peak_memory
from ..errors import LrkvError
from ..evaluate.load import check_folder, read_config
from ..families import CONVERTED
from ..folder.card import CURVE as PICTURE
from ..folder.card import source_metadata
from ..folder.companions import version, write_card
from ..folder.target import tensor_shapes
from ..folder.travelling import write_modeling
from ..folder.writer import RECORD, WORK, ShardWriter, publish, write_json
from ..format import Record
from ..modeling import auto_class
from ..source import Checkpoint, check_finite
from ..source.files import INDICES
from .loop import Trainer
from .run import LOG, Run


def history_entry(
    run: Run,
    trainer: Trainer,
    baseline: dict[str, float],
    teacher: str | None,
    recipe: str | None,
    data: list[str],
) -> dict:
    """What lrkv.json keeps of this healing: all that decides the result, and what came of it."""
    options, accelerator, read = trainer.options, trainer.accelerator, trainer.data
    last = next(line for line in reversed(run.log()) if "validation_nll" in line)
    return {
        "kind": "heal",
        "date": datetime.date.today().isoformat(),
        "recipe": {"name": recipe, **asdict(options)},
        "data": [Path(d).name if Path(d).exists() else d for d in data],
        **read.record(),
        "rounds": round(read.rounds(last["tokens"]), 3),
        "teacher": teacher,
        "loss": {1.0: "kl", 0.0: "ce"}.get(trainer.objective.kl_weight, "mix"),
        "steps": trainer.steps,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "peak_memory_bytes": peak_bytes(accelerator.device),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "validation": {
            "text": (
                [Path(v).name for v in options.validation] if options.validation else "held out"
            ),
            "tokens": read.predicted_of(read.validation),
            "nll": {**baseline, "healed": last["validation_nll"]},
        },
        "versions": {
            "lrkv_convert": version("lrkv-convert"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "picture": PICTURE if importlib.util.find_spec("matplotlib") else None,
    }


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes this process held, on the device that it trained on."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def finish(
    run: Run, trainer: Trainer, model: Path, record: Record, max_shard_size: int | str
) -> None:
    """Write everything a converted folder has into the run's folder and give it its name. Raises
    LrkvError where there is no room.

    model: the folder that was healed; record: lrkv.json of the result.
    """
    accelerator = run.accelerator
    state: Any = accelerator.get_state_dict(trainer.student)  # of a sharded model, too
    if accelerator.is_main_process:
        try:
            write(run, trainer, state, model, record, max_shard_size)
            publish(run.folder, run.out)
        except OSError as error:
            raise LrkvError(
                f"cannot write {run.folder}: {error.strerror or error}",
                f"{run.last_good()}; make room, then go on with --resume",
            ) from error
        shutil.rmtree(run.out / WORK, ignore_errors=True)
    accelerator.wait_for_everyone()


def write(
    run: Run,
    trainer: Trainer,
    state: dict[str, torch.Tensor],
    model: Path,
    record: Record,
    max_shard_size: int | str,
) -> None:
    """The weights, and what stands beside them."""
    student = trainer.accelerator.unwrap_model(trainer.student)
    weights = write_weights(run.folder, student, state, model, max_shard_size)
    for file in model.iterdir():
        apart = file in weights or file.suffix == ".safetensors" or file.name in INDICES
        if file.is_file() and not apart and file.name not in (RECORD, "README.md", LOG, PICTURE):
            shutil.copy(file, run.folder / file.name)
    # the model may have been converted by an older release
    write_modeling(run.folder, record.source.model_type)
    write_json(run.folder / RECORD, record.to_json())
    if record.history[-1].picture:
        from .. import plot

        plot.healing(run.log(), record.history[-1], run.folder / PICTURE)
    write_card(run.folder, record, source_metadata(model), run.out.name)


def write_weights(
    folder: Path,
    student: PreTrainedModel,
    state: dict[str, torch.Tensor],
    model: Path,
    max_shard_size: int | str,
) -> list[Path]:
    """The weights, in the dtype they came in; what did not train is taken over from the folder
    `model`, as it is loaded. Returns the files it was taken from.
    """
    config = read_config(str(model))
    before = check_folder(
        str(model), model, config, auto_class(config.model_type.removeprefix(CONVERTED))
    )
    if before is None:
        raise LrkvError(f"{model} holds quantised weights", "heal the full-precision folder")
    stored = json.loads((model / "config.json").read_text(encoding="utf-8")).get("dtype")
    shapes = written(student, before, getattr(torch, stored or "float32"))
    for stale in folder.glob("*.safetensors*"):  # of a run that was killed here
        stale.unlink()
    writer = ShardWriter(folder, shapes, max_shard_size)
    trained = {
        name for name, p in student.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    for name in shapes:
        if name in trained or name not in before.tensors:
            writer.add(name, check_finite(name, state[name]))
        else:
            writer.add(name, before.tensor(name))
    writer.finish()
    return before.files


def written(
    student: PreTrainedModel, before: Checkpoint, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that is written: all parameters but those that the class
    makes and the folder left out, and of buffers those that the folder has.
    """
    shapes = {
        name: shape
        for name, shape in tensor_shapes(student, dtype).items()
        if name in before.tensors
        or not hasattr(student.get_submodule(name.rpartition(".")[0]), "create_weight")
    }
    return shapes | {
        name: (tuple(buffer.shape), dtype)
        for name, buffer in student.named_buffers()
        if name in before.tensors
    }
