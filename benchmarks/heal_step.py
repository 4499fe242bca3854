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
from transformers.utils import logging

from lrkv_convert.evaluate import load_model
from lrkv_convert.families import ADAPTERS
from lrkv_convert.folder.writer import write_json
from lrkv_convert.train.data import Windows
from lrkv_convert.train.launch import new_accelerator
from lrkv_convert.train.loop import Stop, Trainer
from lrkv_convert.train.optimise import MuonAdamW, groups, schedule
from lrkv_convert.train.options import Options
from lrkv_convert.train.student import choose_trained, set_precision


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
    teacher = load_model(
        args.model,
        accelerator.device,
        torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
    ).requires_grad_(False)
    tokens = np.random.default_rng(0).integers(
        0, teacher.config.vocab_size, (64, options.seq_len), dtype=np.int32
    )
    windows = Windows(tokens, torch.arange(63), torch.tensor([63]), "")
    contenders = {}
    for name, path, with_teacher in (
        ("unconverted, no teacher", args.model, False),
        ("converted, no teacher", args.folder, False),
        ("converted, with teacher", args.folder, True),
    ):
        student = load_model(path, torch.device("cpu"))
        adapter = ADAPTERS[student.config.model_type.removeprefix("lrkv_")]
        choose_trained(student, adapter, options.train)
        set_precision(
            student,
            adapter,
            torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
        )
        student, optimizer = accelerator.prepare(
            student.train(), MuonAdamW(groups(student, options.optimizer), options)
        )
        contenders[name] = Trainer(
            accelerator,
            student,
            teacher if with_teacher else None,
            adapter,
            optimizer,
            schedule(optimizer.optimizer, options),
            windows,
            options,
            1.0 if with_teacher else 0.0,
        )
    times = {name: [] for name in contenders}
    for step in range(args.steps + 1):
        for name, trainer in contenders.items():
            began = time.perf_counter()
            trainer.step(step, None, Stop())
            times[name].append(time.perf_counter() - began)
    size, base = options.batch_size * options.seq_len, None
    rows = []
    for name, taken in times.items():
        seconds = statistics.median(taken[1:])  # the first one warms up
        base = base or seconds
        rows.append(
            {
                "step": name,
                "seconds": seconds,
                "tokens_per_second": size / seconds,
                "ratio": seconds / base,
            }
        )
        print(
            f"{name:<26} {seconds:7.2f} s  {size / seconds:8,.0f} tokens/s  x{seconds / base:.2f}"
        )
    if args.json:
        write_json(
            args.json,
            {
                **environment(accelerator.device),
                "model": Path(args.model).name,
                "precision": accelerator.mixed_precision,
                "tokens_per_step": size,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
