"""The training loop, on accelerate: one process or many, on whatever `accelerate launch` was told.

A step is the same whatever runs it: the windows of a step depend on its number alone, are dealt out
to the processes in turn, and the gradient is the mean over all of them.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..errors import LrkvError, first_line
from ..families import Adapter
from .data import Windows
from .objective import AttentionOutputs, divergence, mismatch
from .optimise import learning_rates
from .options import Options
from .run import Run

# called with every line of the log, and with "steps", how many there will be
Report = Callable[[dict], None]


class Stop:
    """Notes Ctrl-C and SIGTERM while a step is being taken; the same signal again ends at once."""

    def __init__(self):
        self.asked: set[int] = set()

    def _note(self, number: int, frame) -> None:
        if number in self.asked:
            raise KeyboardInterrupt
        self.asked.add(number)

    @contextmanager
    def __call__(self) -> Iterator["Stop"]:
        # only there may signals be handled
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Trainer:
    """Everything a step needs. student, optimizer: as accelerate prepared them; teacher: frozen, or
    None; kl_weight: 1 for kl, 0 for ce.
    """

    accelerator: Accelerator
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    adapter: Adapter
    optimizer: Optimizer
    schedule: LambdaLR
    windows: Windows
    options: Options
    kl_weight: float

    def train(self, run: Run, first: int, baseline: dict[str, float], report: Report) -> None:
        """Steps first, first + 1, ... up to options.steps. baseline: validation loss of the
        original (if known) and of the converted model.

        Raises LrkvError for a loss or gradient that is not finite, KeyboardInterrupt after a
        signal, with the checkpoint saved.
        """
        options, clock = self.options, Clock(self.options.seq_len * self.options.batch_size)
        # of a resumed run
        clock.total = next(
            (line["seconds"] for line in reversed(run.log()) if "seconds" in line), 0.0
        )
        with Stop()() as stop:
            for step in range(first, options.steps):
                with clock:
                    line, stopping = self.step(step, run, stop)
                line |= {
                    "tokens_per_second": round(clock.speed, 1),
                    "seconds": round(clock.total, 2),
                }
                done = step + 1
                # who asked to stop may not wait long
                if done == options.steps or done % options.validate_every == 0 and not stopping:
                    line |= self.validated(baseline)
                run.note(line)
                self.accelerator.log(
                    {name: value for name, value in line.items() if name != "step"}, step=done
                )
                report(line | {"steps": options.steps})
                if stopping or done % options.checkpoint_every == 0 or done == options.steps:
                    run.save(done, {"baseline": baseline})
                if stopping and done < options.steps:
                    raise KeyboardInterrupt(
                        f"interrupted after step {done} of {options.steps}, which {run.folder}"
                        " holds; the same command with --resume goes on from there"
                    )

    def step(self, step: int, run: Run, stop: Stop) -> tuple[dict, bool]:
        """One optimiser step; what to log of it, and whether any process was asked to stop. Raises
        LrkvError where it cannot be taken.
        """
        options, accelerator = self.options, self.accelerator
        chosen = self.windows.batch(step, options.batch_size, options.seed)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(5, device=accelerator.device)  # loss, kl, ce, match, stop
        passes = mine.split(options.micro_batch_size)
        try:
            for part in passes:
                with accelerator.accumulate(self.student):
                    losses = self.losses(self.windows.ids(part).to(accelerator.device))
                    accelerator.backward(losses[0])
                    sums[:4] += torch.stack([x.detach() for x in losses]) / len(passes)
        except torch.OutOfMemoryError as error:
            raise LrkvError(
                f"out of memory at step {step + 1}: {first_line(error)}",
                f"{run.last_good()}; give a smaller micro_batch_size or"
                " gradient_checkpointing=true, also with --resume",
            ) from error
        sums[4] = bool(stop.asked)
        loss, kl, ce, match, stopping = accelerator.reduce(sums, "mean").tolist()
        # DeepSpeed says None at first
        norm = float(
            accelerator.clip_grad_norm_(
                [p for p in self.student.parameters() if p.requires_grad], options.clip
            )
            or 0
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = (
                f"the loss is {loss}"
                if not math.isfinite(loss)
                else f"the gradient's norm is {norm}"
            )
            raise LrkvError(
                f"{what} at step {step + 1}, windows {', '.join(map(str, chosen.tolist()))}",
                f"{run.last_good()}; begin anew with smaller learning rates",
            )
        rates = learning_rates(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        line = {
            "step": step + 1,
            "tokens": (step + 1) * options.batch_size * options.seq_len,
            "loss": loss,
            "ce": ce,
            "grad_norm": norm,
            **{f"lr_{name}": rate for name, rate in rates.items()},
        }
        if self.kl_weight:
            line["kl"] = kl
        if options.match_attention:
            line["match"] = match
        return line, stopping > 0

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids (N, T) -> what is minimised, and its parts: KL, cross-entropy, mismatch of the
        attention outputs.
        """
        student, teacher, matching = self.student, self.teacher, bool(self.options.match_attention)
        hers, logits = [], None
        if self.kl_weight or matching:
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                self.outputs(teacher, matching) as hers,
            ):
                logits = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = logits if self.kl_weight else None
        with self.outputs(self.accelerator.unwrap_model(student), matching) as his:
            # (N (T - 1), V)
            predicted = student(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss, kl, ce = divergence(predicted, logits, ids[:, 1:].flatten(), self.kl_weight)
        match = mismatch(his, hers) if matching else torch.zeros((), device=ids.device)
        return loss + self.options.match_attention * match, kl, ce, match

    def outputs(self, model: PreTrainedModel, wanted: bool):
        return AttentionOutputs(
            model.get_submodule(self.adapter.layer_path) if wanted else [], self.adapter.attention
        )()

    # ----------------------------------------------------------------------------------- validation

    def validated(self, baseline: dict[str, float]) -> dict[str, float]:
        """Validation loss, and the perplexity ratio: to the original, or to the converted model
        where there is no original.
        """
        nll = self.validation_loss(self.student)
        return {
            "validation_nll": nll,
            "validation_ratio": math.exp(nll - baseline.get("original", baseline["converted"])),
        }

    @torch.no_grad()
    def validation_loss(self, model: PreTrainedModel) -> float:
        """Mean negative log-likelihood of the held-out windows, in nats."""
        accelerator, held = self.accelerator, self.windows.validation
        sums, training = (
            torch.zeros(2, dtype=torch.float64, device=accelerator.device),
            model.training,
        )
        model.eval()
        # every process takes as many passes, because a sharded model needs all of them in each; a
        # window seen before counts for nothing
        rounds = -(-len(held) // accelerator.num_processes)
        for i in range(rounds):
            at = i * accelerator.num_processes + accelerator.process_index
            ids = self.windows.ids(held[min(at, len(held) - 1)].unsqueeze(0)).to(accelerator.device)
            with accelerator.autocast():
                logits = model(ids, use_cache=False).logits[0, :-1]
            if at < len(held):
                _, _, ce = divergence(logits, None, ids[0, 1:], 0.0)
                sums += torch.tensor(
                    [ce.double() * len(logits), len(logits)],
                    dtype=torch.float64,
                    device=sums.device,
                )
        model.train(training)
        total, count = accelerator.reduce(sums, "sum").tolist()
        return total / count


class Clock:
    """Seconds of training in all, and tokens per second lately."""

    def __init__(self, tokens: int):
        self.tokens, self.total, self.speed, self.began = tokens, 0.0, 0.0, 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error) -> None:
        spent = time.perf_counter() - self.began
        self.total += spent
        self.speed = (
            self.tokens / spent if not self.speed else 0.9 * self.speed + 0.1 * self.tokens / spent
        )
