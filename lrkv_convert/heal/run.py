"""The folder of a run in progress, <out>.partial: packed data, checkpoints, the log. Whatever happens to the process, the last checkpoint is whole.

    <out>.partial/heal.jsonl               one line per step, one per validation
    <out>.partial/work/heal.json           what was asked for; a resumed run must ask for the same
    <out>.partial/work/windows.npy         packed data (data.py)
    <out>.partial/work/checkpoint-000120/  model, optimisers, schedules, random numbers (accelerate's save_state), and state.json
"""
import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..errors import LrkvError, first_line
from ..writer import PARTIAL, WORK, write_json

LOG, RUN, STATE, UNFINISHED = "heal.jsonl", "heal.json", "state.json", ".tmp"


class Run:
    """The unfinished run that will become `out`.

    asked: option -> value, all that decides the result. Only the main process writes; the others wait for it.
    """

    def __init__(self, out: Path, asked: dict, accelerator: Accelerator, keep: int):
        self.out, self.asked, self.accelerator, self.keep = out, json.loads(json.dumps(asked, default=str)), accelerator, keep
        self.folder = out.with_name(out.name + PARTIAL)
        self.work, self.made = self.folder / WORK, False

    def begin(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or find the one to go on from. Raises LrkvError where the two are at odds, or other arguments were given then."""
        there = self.latest()
        if resume:
            if there is None:
                raise LrkvError(f"there is no run to resume in {self.folder}", "leave --resume out")
            before = json.loads((self.work / RUN).read_text(encoding="utf-8"))
            for name in self.asked.keys() | before.keys():
                if before.get(name) != self.asked.get(name):
                    raise LrkvError(f"the run in {self.folder} was begun with {name} {before.get(name)}, not {self.asked.get(name)}",
                                    "resume with the same arguments, or begin anew with --overwrite")
        elif there is not None and not overwrite:
            raise LrkvError(f"{self.folder} holds a run that stopped after step {step_of(there)}", "--resume goes on from there, --overwrite begins anew")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not resume:
            try:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.work.mkdir(parents=True)
                write_json(self.work / RUN, self.asked)
                self.made = True
            except OSError as error:
                raise LrkvError(f"cannot write {self.folder}: {error.strerror or error}", "check permissions and free space") from error
        self.accelerator.wait_for_everyone()

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in self.work.glob("checkpoint-*") if p.suffix != UNFINISHED) if (self.work / RUN).is_file() else []

    def latest(self) -> Path | None:
        return (self.checkpoints() or [None])[-1]

    def save(self, step: int, state: dict) -> None:
        """Save a checkpoint after `step` steps, then let go of those beyond `keep`. Raises LrkvError where there is no room."""
        target = self.work / f"checkpoint-{step:06d}"
        unfinished = target.with_name(target.name + UNFINISHED)
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(unfinished))
            if self.accelerator.is_main_process:
                write_json(unfinished / STATE, {"step": step, **state})
        except Exception as error:          # OSError, torch's RuntimeError, safetensors' own: a full disk comes in many forms
            shutil.rmtree(unfinished, ignore_errors=True)
            raise LrkvError(f"cannot save the checkpoint of step {step}: {first_line(error)}", f"{self.last_good()}; make room, then go on with --resume") from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(unfinished, target)
            for old in self.checkpoints()[:-self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def last_good(self) -> str:
        """In words: the checkpoint to fall back on."""
        return f"the last good checkpoint is {self.latest()}" if self.latest() else "there is no checkpoint yet"

    def load(self) -> dict:
        """Put the last checkpoint into everything accelerate has prepared; its state. The log is cut back to it."""
        self.accelerator.load_state(str(self.latest()), strict=False)       # frozen weights are not in it
        state = json.loads((self.latest() / STATE).read_text(encoding="utf-8"))
        if self.accelerator.is_main_process:
            kept = [json.dumps(line) for line in self.log() if line["step"] <= state["step"]]
            (self.folder / LOG).write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return state

    def note(self, line: dict) -> None:
        """Append to the log."""
        if self.accelerator.is_main_process:
            with open(self.folder / LOG, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def log(self) -> list[dict]:
        """What was noted so far; a last line that was cut short is left out."""
        lines = []
        for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines() if (self.folder / LOG).is_file() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def abandon(self) -> None:
        """Leave nothing behind, if there is nothing worth keeping."""
        if self.made and self.latest() is None:
            shutil.rmtree(self.folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
