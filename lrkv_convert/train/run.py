"""The folder of a run in progress, <out>.partial: packed data, checkpoints, the log. Whatever
happens to the process, the last checkpoint is whole.

    heal.jsonl              one line per step, with what validation found
    work:
      heal.json             what was asked for; a resumed run must ask for the same
      windows.*             packed data of a decoder (windows.py)
      examples*             of an encoder-decoder (pairs.py)
      checkpoint-000120     trained weights, optimiser, schedule, random numbers (accelerate's
                            save_state), and state.json
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator

from ..errors import LrkvError, first_line
from ..folder.lock import claim
from ..folder.store import FINGERPRINT
from ..folder.writer import HEALING, PARTIAL, WORK, blank, write_json

LOG, RUN, STATE, UNFINISHED = "heal.jsonl", Path(HEALING).name, "state.json", ".tmp"


class Run:
    """The unfinished run that will become `out`.

    asked: option -> value, all that decides the result. Only the main process writes; the others
    wait for it.
    """

    def __init__(self, out: Path, asked: dict, accelerator: Accelerator, keep: int):
        self.out, self.asked, self.accelerator, self.keep = (
            out,
            json.loads(json.dumps(asked, default=str)),
            accelerator,
            keep,
        )
        self.folder = out.with_name(out.name + PARTIAL)
        self.work, self.made, self.lock = self.folder / WORK, False, None
        # deepest first
        self.new_parents = [folder for folder in self.folder.parents if not folder.exists()]

    def begin(self, resume: bool, overwrite: bool, notice: Callable[[str], None]) -> bool:
        """Make the folder, or find the one to go on from; whether there is one. Raises LrkvError
        where the two are at odds, or other arguments were given then.
        """
        there, before = self.latest(), self.asked_before()
        # a job that is queued again and again may always say --resume
        if resume and there is None:
            notice(f"there is no checkpoint in {self.folder} to resume from: beginning")
            resume = False
        if resume:
            self.compare(before or {})
        else:
            self.check_free(overwrite)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                self.make(resume)
            except OSError as error:
                raise LrkvError(
                    f"cannot write {self.folder}: {error.strerror or error}",
                    "check permissions and free space",
                ) from error
        self.accelerator.wait_for_everyone()
        return resume

    def check_free(self, overwrite: bool) -> None:
        """Raise LrkvError for something in the folder's place that may not be replaced."""
        there = self.latest()
        if there is not None and not overwrite:
            raise LrkvError(
                f"{self.folder} holds a run that stopped after step {step_of(there)}",
                "--resume goes on from there, --overwrite begins anew",
            )
        if (
            self.asked_before() is None
            and self.folder.exists()
            and not blank(self.folder)
            and not (overwrite and (self.work / FINGERPRINT).is_file())
        ):
            raise LrkvError(
                f"{self.folder} is in the way: it holds something other than a run of heal",
                "give another --out, or remove it",
            )

    def make(self, resume: bool) -> None:
        """Make the folder anew, unless it is gone on with. Raises OSError."""
        self.claim()
        # data that this run packed before it was killed is kept
        if not resume and (self.asked_before() != self.asked or self.latest() is not None):
            self.made = True
            shutil.rmtree(self.folder, ignore_errors=True)
            self.work.mkdir(parents=True)
            self.claim()
            write_json(self.work / RUN, self.asked)
        self.made = not resume

    def claim(self) -> None:
        """Keep other processes out of the folder, if it is there, for as long as this one lives."""
        if self.lock is not None:
            self.lock.close()
        self.lock = claim(self.work)

    def compare(self, before: dict) -> None:
        """Raise LrkvError where the run was begun with other arguments."""
        for name in self.asked.keys() | before.keys():
            if before.get(name) != self.asked.get(name):
                what = (
                    "from other weights"
                    if name == "model"
                    else f"with {name} {before.get(name)}, not {self.asked.get(name)}"
                )
                raise LrkvError(
                    f"the run in {self.folder} was begun {what}",
                    "resume with the same arguments, or begin anew with --overwrite",
                )

    def asked_before(self) -> dict | None:
        """What the run in the folder was asked for; None if there is none."""
        return (
            json.loads((self.work / RUN).read_text(encoding="utf-8"))
            if (self.work / RUN).is_file()
            else None
        )

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = (
            [p for p in self.work.glob("checkpoint-*") if p.suffix != UNFINISHED]
            if (self.work / RUN).is_file()
            else []
        )
        return sorted(found, key=step_of)

    def latest(self) -> Path | None:
        return (self.checkpoints() or [None])[-1]

    def save(self, step: int, state: dict) -> None:
        """Save a checkpoint after `step` steps, then let go of those beyond `keep`. Raises
        LrkvError where there is no room.
        """
        target = self.work / f"checkpoint-{step:06d}"
        unfinished = target.with_name(target.name + UNFINISHED)
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(unfinished))
            if self.accelerator.is_main_process:
                write_json(unfinished / STATE, {"step": step, **state})
        # OSError, torch's RuntimeError, safetensors' own: a full disk comes in many forms
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise LrkvError(
                f"cannot save the checkpoint of step {step}: {first_line(error)}",
                f"{self.last_good()}; make room, then go on with --resume",
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(unfinished, target)
            for old in self.checkpoints()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def last_good(self) -> str:
        """In words: the checkpoint to fall back on."""
        return (
            f"the last good checkpoint is {self.latest()}"
            if self.latest()
            else "there is no checkpoint yet"
        )

    def load(self) -> dict:
        """Put the last checkpoint into everything accelerate has prepared; its state. The log is
        cut back to it. Raises LrkvError.
        """
        latest = self.latest()
        assert latest is not None, "there is a checkpoint where a run is resumed"
        try:
            self.accelerator.load_state(str(latest))
            # passes since the last step: another number of processes or passes per step may go on
            # from here
            self.accelerator.step = 0
            state = json.loads((latest / STATE).read_text(encoding="utf-8"))
            if self.accelerator.is_main_process:
                kept, temporary = (
                    [json.dumps(line) for line in self.log() if line["step"] <= state["step"]],
                    self.folder / (LOG + UNFINISHED),
                )
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                os.replace(temporary, self.folder / LOG)
        except LrkvError:
            raise
        except Exception as error:
            raise LrkvError(
                f"cannot go on from {latest}: {first_line(error)}",
                "begin anew with --overwrite, or remove this checkpoint to go on from the one"
                " before",
            ) from error
        self.accelerator.wait_for_everyone()
        return state

    def note(self, line: dict) -> None:
        """Append to the log. Raises LrkvError where there is no room."""
        if self.accelerator.is_main_process:
            try:
                with open(self.folder / LOG, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
            except OSError as error:
                raise LrkvError(
                    f"cannot write {self.folder / LOG}: {error.strerror or error}",
                    f"{self.last_good()}; make room, then go on with --resume",
                ) from error

    def log(self) -> list[dict]:
        """What was noted so far; a last line that was cut short is left out."""
        lines = []
        for line in (
            (self.folder / LOG).read_text(encoding="utf-8").splitlines()
            if (self.folder / LOG).is_file()
            else []
        ):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def leave(self) -> None:
        """Let others have the folder; leave nothing behind, if there is nothing worth keeping."""
        if self.lock is not None:
            self.lock.close()
        if self.made and self.latest() is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self.new_parents:
                with suppress(OSError):
                    folder.rmdir()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
