"""The training loop, on accelerate: one process or many, on whatever `accelerate launch` was told.

A step is the same whatever runs it: the examples of a step depend on its number alone, are dealt
out to the processes in turn, and the gradient is that of the mean over all tokens they predict.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..errors import LrkvError, first_line
from .batch import together
from .data import Data
from .objective import Objective
from .optimise import learning_rates
from .options import Options
from .run import Run
from .stop import Stop
from .validation import validation_loss

# called with every line of the log, and with "steps", how many there will be
Report = Callable[[dict], None]


@dataclass
class Trainer:
    """Everything a step needs. student, optimizer: as accelerate prepared them; steps: how many
    there will be; tokens: read in all steps so far.
    """

    accelerator: Accelerator
    student: PreTrainedModel
    objective: Objective
    optimizer: Optimizer
    schedule: LambdaLR
    data: Data
    options: Options
    steps: int
    tokens: int = 0

    def train(self, run: Run, first: int, baseline: dict[str, float], report: Report) -> None:
        """Steps first, first + 1, ... up to the last. baseline: validation loss of the original (if
        known) and of the converted model.

        Raises LrkvError for a loss or gradient that is not finite, KeyboardInterrupt after a
        signal, with the checkpoint saved.
        """
        clock = Clock(run.log())
        self.tokens = clock.tokens
        with Stop()() as stop:
            for step in range(first, self.steps):
                clock.start()
                line, stopping = self.step(step, run, stop)
                line |= clock.stop(self.tokens)
                self.note(run, line, baseline, stopping, report)
                done = step + 1
                if stopping or done % self.options.checkpoint_every == 0 or done == self.steps:
                    run.save(done, {"baseline": baseline})
                if stopping and done < self.steps:
                    raise KeyboardInterrupt(
                        f"interrupted after step {done} of {self.steps}, which {run.folder}"
                        " holds; the same command with --resume goes on from there"
                    )

    def note(
        self, run: Run, line: dict, baseline: dict[str, float], stopping: bool, report: Report
    ) -> None:
        """Write a step's line, with what validation finds where it is due, wherever it is read."""
        done = line["step"]
        # who asked to stop may not wait long
        if done == self.steps or done % self.options.validate_every == 0 and not stopping:
            line |= self.validated(baseline)
        run.note(line)
        self.accelerator.log(
            {name: value for name, value in line.items() if name != "step"}, step=done
        )
        report(line | {"steps": self.steps})

    def step(self, step: int, run: Run, stop: Stop) -> tuple[dict, bool]:
        """One optimiser step; what to log of it, and whether any process was asked to stop. Raises
        LrkvError where it cannot be taken.
        """
        chosen = self.data.batch(step, self.options.batch_size, self.options.seed)
        try:
            sums = self.gradient(chosen)
        except torch.OutOfMemoryError as error:
            raise LrkvError(
                f"out of memory at step {step + 1}: {first_line(error)}",
                f"{run.last_good()}; give a smaller micro_batch_size or"
                " gradient_checkpointing=true, also with --resume",
            ) from error
        sums[4] = bool(stop.asked)
        mean = cast(Tensor, self.accelerator.reduce(sums, "mean"))
        loss, kl, ce, match, stopping = mean.tolist()
        norm = self.clipped()
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                where = f"{self.data.noun} {', '.join(map(str, chosen.tolist()))}"
                raise LrkvError(
                    f"the {what} is {value} at step {step + 1}, {where}",
                    f"{run.last_good()}; begin anew with smaller learning rates",
                )
        rates = learning_rates(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.tokens += self.data.tokens_of(chosen)
        line = {"step": step + 1, "tokens": self.tokens, "loss": loss, "ce": ce, "grad_norm": norm}
        line |= {f"lr_{name}": rate for name, rate in rates.items()}
        line |= {"kl": kl} if self.objective.kl_weight else {}
        line |= {"match": match} if self.objective.match_attention else {}
        return line, stopping > 0

    def gradient(self, chosen: Tensor) -> Tensor:
        """Add up the gradient of the mean over all tokens predicted in the chosen examples. Returns
        (5,): this process's share of loss, KL, cross-entropy and mismatch, and room for one more.
        """
        accelerator, options = self.accelerator, self.options
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        passes, total = mine.split(options.micro_batch_size), self.data.predicted_of(chosen)
        sums = torch.zeros(5, device=accelerator.device)
        for part in passes:
            # accelerate takes the mean over passes and processes: 1 where all predict as many
            weight = self.data.predicted_of(part) * (len(chosen) // len(part)) / total
            with accelerator.accumulate(self.student):
                batch = together(self.data.examples(part)).to(accelerator.device)
                losses = self.objective(batch)
                accelerator.backward(weight * losses[0])
                sums[:4] += weight * torch.stack([x.detach() for x in losses]) / len(passes)
        return sums

    def clipped(self) -> float:
        """Clip the gradient; its norm before."""
        trained = [p for p in self.student.parameters() if p.requires_grad]
        # DeepSpeed says None at first
        return float(self.accelerator.clip_grad_norm_(trained, self.options.clip) or 0)

    def validated(self, baseline: dict[str, float]) -> dict[str, float]:
        """Validation loss, and the perplexity ratio: to the original, or to the converted model
        where there is no original.
        """
        nll = validation_loss(self.accelerator, self.student, self.data)
        return {
            "validation_nll": nll,
            "validation_ratio": math.exp(nll - baseline.get("original", baseline["converted"])),
        }


class Clock:
    """Seconds of training in all, and tokens per second lately.

    log: of a resumed run, whose seconds and tokens count.
    """

    def __init__(self, log: list[dict]):
        self.total = next((line["seconds"] for line in reversed(log) if "seconds" in line), 0.0)
        self.tokens = log[-1]["tokens"] if log else 0
        self.speed, self.began = 0.0, 0.0

    def start(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def stop(self, tokens: int) -> dict[str, float]:
        """A step is done, and so many tokens were read in all; what to log of it."""
        spent = time.perf_counter() - self.began
        speed = (tokens - self.tokens) / spent
        self.total, self.tokens = self.total + spent, tokens
        self.speed = speed if not self.speed else 0.9 * self.speed + 0.1 * speed
        return {"tokens_per_second": round(self.speed, 1), "seconds": round(self.total, 2)}
