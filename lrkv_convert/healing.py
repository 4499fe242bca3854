"""The story of healing:

    converted folder --data--> examples --train--> checkpoints --write--> the same folder with
    better weights the original (teacher) --------^

The result has the form of a converted folder and loads the same way; its lrkv.json and its model
card say how it came about.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .errors import LrkvError
from .evaluate.load import read_config
from .families import Family, family_named
from .folder.places import folder_to_make
from .folder.record import read_record
from .folder.writer import RECORD, check_output, check_shard_size
from .format import Healed
from .train.launch import new_accelerator
from .train.loop import Report
from .train.options import Options
from .train.reading import Reading
from .train.result import finish, history_entry
from .train.run import Run
from .train.start import begin, new_trainer
from .train.teacher import absolute, choose_loss

# when a run is resumed
MAY_DIFFER = (
    "micro_batch_size",
    "gradient_checkpointing",
    "validate_every",
    "checkpoint_every",
    "keep",
    "tracker",
)


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the folder it wrote, its entry in the history of lrkv.json, and the family
    of the model; main: whether this process speaks for all.
    """

    out: Path
    entry: Healed
    family: Family
    main: bool = True


def heal(
    model: str | Path,
    out: str | Path,
    data: list[str],
    *,
    teacher: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    recipe: str | None = None,
    max_shard_size: int | str = "5GB",
    report: Report = lambda line: None,
    stage: Callable[[str], None] = lambda name: None,
    notice: Callable[[str], None] = lambda text: None,
    **options,
) -> Healing:
    """Train the converted folder `model` for a while and write the result to `out`; `options` are
    the fields of `Options`.

    data: of a decoder text, jsonl or parquet files, folders of them, or datasets
    "org/name:config:split"; of an encoder-decoder what `convert` calibrates it on; teacher: the
    original (default: the one lrkv.json names, if it is still there); device: "auto", "cpu" or
    "cuda"; overwrite: replace an earlier healed folder, or an unfinished run; resume: go on from
    the last checkpoint of a run that stopped, with the same bytes as a result on a CPU; recipe:
    name to record; report: called after every step; stage: called with what is being done; notice:
    with what the user should know. Raises LrkvError for anything that cannot be done as asked;
    checkpoints are kept then. After Ctrl-C or SIGTERM a checkpoint is saved and KeyboardInterrupt
    raised.
    """
    model, out, options = Path(model).expanduser(), folder_to_make(out), Options(**options)
    options.check()
    check_shard_size(max_shard_size)
    record, family = read_record(model), family_of_converted(model)
    if family.encoder is None:
        options.steps(options.seq_len)  # refuses, before the work, tokens too few for one
    if resume and (out / RECORD).is_file() and not overwrite:
        raise LrkvError(f"{out} is finished: there is nothing to resume", "--overwrite begins anew")
    check_output(out, model, overwrite)
    teacher, kl_weight = choose_loss(teacher, record, options, notice)
    accelerator = new_accelerator(device, options, out)
    run = Run(out, asked(model, data, teacher, options), accelerator, options.keep)
    with ending(run):
        resume = run.begin(resume, overwrite, notice)
        stage("reading the data")
        read = Reading(model, family, data, teacher, options, stage).read(run)
        stage("loading")
        trainer = new_trainer(model, family, teacher, kl_weight, read, options, accelerator)
        baseline, first = begin(trainer, run, resume, stage)
        stage("training")
        trainer.train(run, first, baseline, report)
        stage("writing")
        said = history_entry(run, trainer, baseline, teacher, recipe, data)
        entry = Healed.from_json(said, "the history")
        # what was measured is of the weights before
        record = replace(record, history=(*record.history, entry), evaluations=())
        finish(run, trainer, model, record, max_shard_size)
        return Healing(out, entry, family, accelerator.is_main_process)


def family_of_converted(model: Path) -> Family:
    """The family of a converted folder. Raises LrkvError for one this package does not know."""
    config = read_config(str(model))
    family = family_named(config.model_type)
    if family is None:
        raise LrkvError(
            f"the family {config.model_type!r} of {model} is not supported",
            "make a converted model with lrkv convert MODEL --out DIR",
        )
    return family


@contextmanager
def ending(run: Run) -> Iterator[None]:
    """However the block ends: let go of the folder and say, where it was interrupted, what there
    is.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not stop.args and run.latest():
            raise KeyboardInterrupt(
                f"interrupted; {run.last_good()}; the same command with --resume goes on from there"
            ) from None
        raise
    finally:
        run.leave()
        with redirect_stdout(sys.stderr):
            run.accelerator.end_training()


def asked(model: Path, data: list[str], teacher: str | None, options: Options) -> dict:
    """All that decides the result: a run that is resumed must ask for the same."""
    return {
        "model": fingerprint(model),
        "data": [absolute(d) for d in data],
        "teacher": teacher,
        **{name: value for name, value in asdict(options).items() if name not in MAY_DIFFER},
    }


def fingerprint(model: Path) -> str:
    """What tells this folder's weights from others', without reading them: its record, and the
    sizes of its files.
    """
    sizes = [(f.name, f.stat().st_size) for f in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256(repr(sizes).encode() + (model / RECORD).read_bytes()).hexdigest()
