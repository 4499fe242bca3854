"""The story of healing:

    converted folder --data--> packed windows --train--> checkpoints --write--> the same folder with
    better weights the original (teacher) --------^

The result has the form of a converted folder and loads the same way; its lrkv.json and its model
card say how it came about.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import DistributedType

from .errors import LrkvError
from .evaluate.load import load_model, load_tokenizer, read_config, refuse_encoder
from .families import family_named
from .folder.places import folder_to_make
from .folder.record import read_record
from .folder.writer import RECORD, check_output, check_shard_size
from .format import Healed, Record
from .train.data import Windows, pack, packed
from .train.launch import new_accelerator
from .train.loop import Report, Trainer
from .train.optimise import MuonAdamW, groups, schedule
from .train.options import Options
from .train.result import finish, history_entry
from .train.run import Run
from .train.student import choose_trained, load_trained, only_trained, set_precision

# every process holds the whole model
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
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
    """What `heal` did: the folder it wrote, and its entry in the history of lrkv.json; main:
    whether this process speaks for all.
    """

    out: Path
    entry: Healed
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

    data: text, jsonl or parquet files, folders of them, or datasets "org/name:config:split";
    teacher: the original (default: the one lrkv.json names, if it is still there); device: "auto",
    "cpu" or "cuda"; overwrite: replace an earlier healed folder, or an unfinished run; resume: go
    on from the last checkpoint of a run that stopped, with the same bytes as a result on a CPU;
    recipe: name to record; report: called after every step; stage: called with what is being done;
    notice: with what the user should know. Raises LrkvError for anything that cannot be done as
    asked; checkpoints are kept then. After Ctrl-C or SIGTERM a checkpoint is saved and
    KeyboardInterrupt raised.
    """
    model, out, options = Path(model).expanduser(), folder_to_make(out), Options(**options)
    options.check()
    check_shard_size(max_shard_size)
    record = read_record(model)
    refuse_encoder(str(model), read_config(str(model)))
    if resume and (out / RECORD).is_file() and not overwrite:
        raise LrkvError(f"{out} is finished: there is nothing to resume", "--overwrite begins anew")
    check_output(out, model, overwrite)
    teacher, kl_weight = choose_loss(teacher, record, options, notice)
    accelerator = new_accelerator(device, options, out)
    asked = {
        "model": fingerprint(model),
        "data": [absolute(d) for d in data],
        "teacher": teacher,
        **{name: value for name, value in asdict(options).items() if name not in MAY_DIFFER},
    }
    run = Run(out, asked, accelerator, options.keep)
    try:
        resume = run.begin(resume, overwrite, notice)
        stage("reading the data")
        windows = read_data(run, data, model, teacher, options)
        stage("loading")
        trainer, baseline, first = prepare(
            model, teacher, kl_weight, windows, options, run, resume, stage
        )
        stage("training")
        trainer.train(run, first, baseline, report)
        stage("writing")
        said = history_entry(run, trainer, baseline, teacher, recipe, data)
        entry = Healed.from_json(said, "the history")
        finish(
            run,
            trainer,
            model,
            # what was measured is of the weights before
            replace(record, history=(*record.history, entry), evaluations=()),
            max_shard_size,
        )
        return Healing(out, entry, accelerator.is_main_process)
    except KeyboardInterrupt as stop:
        if not stop.args and run.latest():
            raise KeyboardInterrupt(
                f"interrupted; {run.last_good()}; the same command with --resume goes on from there"
            ) from None
        raise
    finally:
        run.leave()
        with redirect_stdout(sys.stderr):
            accelerator.end_training()


def choose_loss(
    teacher: str | None, record: Record, options: Options, notice: Callable[[str], None]
) -> tuple[str | None, float]:
    """(the original, weight of KL in the loss). Raises LrkvError for a loss that wants a teacher
    where there is none.
    """
    named = record.source.path
    found = teacher or (named if named and Path(named).exists() else None)
    if found is None:
        wanted = (
            f"the loss {options.loss}"
            if options.loss in ("kl", "mix")
            else "match_attention"
            if options.match_attention
            else None
        )
        if wanted:
            raise LrkvError(
                f"{wanted} needs the original model, and {named or 'it'} is no longer there",
                "give --teacher, or use loss: ce",
            )
        notice(
            f"the original is not at {named}: training on cross-entropy, without it (--teacher says"
            " where it is)"
        )
    return (
        found and absolute(found),
        {"auto": 1.0 if found else 0.0, "kl": 1.0, "ce": 0.0, "mix": options.kl_weight}[
            options.loss
        ],
    )


def absolute(name: str) -> str:
    """A path that holds wherever the command is given again; ids of the hub as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def fingerprint(model: Path) -> str:
    """What tells this folder's weights from others', without reading them: its record, and the
    sizes of its files.
    """
    sizes = [(f.name, f.stat().st_size) for f in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256(repr(sizes).encode() + (model / RECORD).read_bytes()).hexdigest()


def read_data(
    run: Run, data: list[str], model: Path, teacher: str | None, options: Options
) -> Windows:
    """The packed data of this run, made by the main process if it is not there yet. Raises
    LrkvError, also for tokenizers that differ.
    """
    config, tokenizer = read_config(str(model)), load_tokenizer(str(model))
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and options.seq_len > limit:
        raise LrkvError(
            f"windows of {options.seq_len} tokens are longer than {model} can read ({limit})",
            "give a smaller seq_len",
        )
    if teacher is not None:
        check_teacher(teacher, config, tokenizer)
    if run.accelerator.is_main_process and packed(run.work) is None:
        try:
            pack(
                data,
                tokenizer,
                run.work,
                seq_len=options.seq_len,
                tokens=options.tokens,
                validation=options.validation,
                validation_tokens=options.validation_tokens,
                field=options.text_field,
                seed=options.seed,
                vocabulary=config.vocab_size,
            )
        except OSError as error:
            raise LrkvError(
                f"cannot write {run.work}: {error.strerror or error}",
                "check permissions and free space",
            ) from error
    run.accelerator.wait_for_everyone()
    if (windows := packed(run.work)) is None:
        raise LrkvError(
            f"this process does not see {run.work}", "all nodes must share the folder of --out"
        )
    return windows


def check_teacher(teacher: str, config, tokenizer) -> None:
    """Raise LrkvError for an original with another vocabulary, or another tokenizer."""
    size = read_config(teacher).get_text_config().vocab_size
    if size != config.vocab_size:
        raise LrkvError(
            f"the teacher {teacher} has another vocabulary ({size} tokens, the student"
            f" {config.vocab_size})",
            "give the model that was converted",
        )
    try:
        theirs, ours = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
    except LrkvError:
        return  # a teacher without one reads the student's tokens
    shared = theirs.keys() & ours.keys()  # padding may differ
    if len(shared) < 0.9 * len(ours) or any(theirs[token] != ours[token] for token in shared):
        raise LrkvError(
            f"the tokenizer of the teacher {teacher} is another one than the student's",
            "give the model that was converted",
        )


def prepare(
    model: Path,
    teacher: str | None,
    kl_weight: float,
    windows: Windows,
    options: Options,
    run: Run,
    resume: bool,
    stage: Callable[[str], None],
) -> tuple[Trainer, dict[str, float], int]:
    """(trainer, validation losses before training, the step to begin with)."""
    accelerator = run.accelerator
    student = load_model(str(model), torch.device("cpu"))
    adapter = family_named(student.config.model_type).any
    choose_trained(student, adapter, options.train)
    set_precision(
        student,
        adapter,
        frozen=(
            torch.bfloat16
            if accelerator.mixed_precision == "bf16" and accelerator.distributed_type in PLAIN
            else torch.float32
        ),
    )
    if options.gradient_checkpointing:
        # its newer name
        enable = getattr(
            student, "activation_checkpointing_enable", student.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    student, optimizer = accelerator.prepare(
        student.train(), MuonAdamW(groups(student, options.optimizer), options)
    )
    rates = schedule(optimizer.optimizer, options)
    accelerator.register_for_checkpointing(rates)
    if accelerator.distributed_type in PLAIN:
        accelerator.register_save_state_pre_hook(only_trained)
        accelerator.register_load_state_pre_hook(load_trained)
    original = None
    if teacher is not None:
        original = load_model(
            teacher,
            accelerator.device,
            torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
        ).requires_grad_(False)
    trainer = Trainer(
        accelerator, student, original, adapter, optimizer, rates, windows, options, kl_weight
    )
    with redirect_stdout(sys.stderr):  # trackers greet, and stdout is the result's
        accelerator.init_trackers(
            "lrkv-heal",
            config={
                name: value
                for name, value in asdict(options).items()
                if isinstance(value, (int, float, str))
            },
        )
    if resume:
        state = run.load()
        return trainer, state["baseline"], state["step"]
    stage("measuring")
    baseline = {"converted": trainer.validation_loss(student)}
    if original is not None:
        baseline["original"] = trainer.validation_loss(original)
        if not kl_weight and not options.match_attention:
            trainer.teacher = None  # it was here to be compared with
    ratio = (
        {
            "validation_ratio": math.exp(baseline["converted"] - baseline["original"]),
            "original_nll": baseline["original"],
        }
        if "original" in baseline
        else {}
    )
    run.note({"step": 0, "tokens": 0, "validation_nll": baseline["converted"], **ratio})
    stage(
        f"before training: held-out perplexity {math.exp(baseline['converted']):.3f}"
        + (f", ×{ratio['validation_ratio']:.4f} of the original's" if ratio else "")
        + f"; {options.steps:,} steps"
    )
    return trainer, baseline, 0
