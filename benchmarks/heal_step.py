"""What a healing step costs: the converted model beside the unconverted one, the same loop,
optimisers and tokens.

    python benchmarks/heal_step.py MODEL DIR [--steps N] [--json FILE]

Steps of the contenders are taken in turn, so that a noisy machine is noisy for all; medians are
compared.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from environment import environment
from transformers import PreTrainedModel
from transformers.utils import logging

from lrkv_convert.evaluate import load_model
from lrkv_convert.families import family_named
from lrkv_convert.folder.writer import write_json
from lrkv_convert.train.launch import new_accelerator
from lrkv_convert.train.loop import Trainer
from lrkv_convert.train.objective import Objective
from lrkv_convert.train.optimise import MuonAdamW, groups, schedule
from lrkv_convert.train.options import Options
from lrkv_convert.train.stop import Stop
from lrkv_convert.train.student import choose_trained, set_precision
from lrkv_convert.train.windows import Windows


def contender(
    path: str, teacher: PreTrainedModel | None, windows: Windows, options: Options, accelerator
) -> Trainer:
    """A model that trains, converted or not; without a teacher, on cross-entropy."""
    student = load_model(path, torch.device("cpu"))
    family = family_named(student.config.model_type)
    sites = family.sites(student.config)
    choose_trained(student, sites, options.train)
    small = accelerator.mixed_precision == "bf16"
    set_precision(student, family, torch.bfloat16 if small else torch.float32)
    student, optimizer = accelerator.prepare(
        student.train(), MuonAdamW(groups(student, options.optimizer), options)
    )
    steps = options.steps(options.seq_len)
    paths, kl_weight = [site.path for site in sites], float(teacher is not None)
    objective = Objective(accelerator, student, teacher, paths, kl_weight, options.match_attention)
    rates = schedule(optimizer.optimizer, options, steps)
    return Trainer(accelerator, student, objective, optimizer, rates, windows, options, steps)


def measure(contenders: dict[str, Trainer], steps: int, tokens: int) -> list[dict]:
    """Rows of seconds a step, the first contender's beside the others'."""
    times = {name: [] for name in contenders}
    for step in range(steps + 1):
        for name, trainer in contenders.items():
            began = time.perf_counter()
            trainer.step(step, None, Stop())
            times[name].append(time.perf_counter() - began)
    # the first one warms up
    seconds = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    base = next(iter(seconds.values()))
    return [
        {"step": name, "seconds": s, "tokens_per_second": tokens / s, "ratio": s / base}
        for name, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    options = Options(precision=args.precision, tracker="none")
    accelerator = new_accelerator(args.device, options, Path("unused"))
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    teacher = load_model(args.model, accelerator.device, dtype).requires_grad_(False)
    tokens = np.random.default_rng(0).integers(
        0, teacher.config.vocab_size, (64, options.seq_len), dtype=np.int32
    )
    windows = Windows(torch.arange(63), torch.tensor([63]), "", tokens)
    contenders = {
        name: contender(path, original, windows, options, accelerator)
        for name, path, original in (
            ("unconverted, no teacher", args.model, None),
            ("converted, no teacher", args.folder, None),
            ("converted, with teacher", args.folder, teacher),
        )
    }
    per_step = options.batch_size * options.seq_len
    rows = measure(contenders, args.steps, per_step)
    for row in rows:
        print(
            f"{row['step']:<26} {row['seconds']:7.2f} s  {row['tokens_per_second']:8,.0f} tokens/s"
            f"  x{row['ratio']:.2f}"
        )
    if args.json:
        about = {"model": Path(args.model).name, "precision": accelerator.mixed_precision}
        about |= {"tokens_per_step": per_step, "rows": rows}
        write_json(args.json, {**environment(accelerator.device), **about})


if __name__ == "__main__":
    main()
