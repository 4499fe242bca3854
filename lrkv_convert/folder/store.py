"""What a conversion has worked out so far, on disk: a run that was killed goes on from there, and
memory holds one layer at a time.
"""

import json
import os
from pathlib import Path

import torch

from ..errors import LrkvError
from .places import remove_folder

FINGERPRINT = "run.json"


class Store:
    """Values by name, each a file that is whole or absent.

    folder: made if missing; fingerprint: what the values depend on. Values of another fingerprint
    are never found.
    """

    def __init__(self, folder: Path, fingerprint: dict):
        self.folder = folder
        if not self.holds(folder, fingerprint):
            self.discard(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FINGERPRINT).write_text(self._text(fingerprint), encoding="utf-8")

    @staticmethod
    def _text(fingerprint: dict) -> str:
        return json.dumps(fingerprint, sort_keys=True, default=str)

    @classmethod
    def holds(cls, folder: Path, fingerprint: dict) -> bool:
        """Whether the values there are those of this fingerprint."""
        return (folder / FINGERPRINT).is_file() and (folder / FINGERPRINT).read_text(
            encoding="utf-8"
        ) == cls._text(fingerprint)

    def clear(self) -> None:
        """Let go of the values; what is left says whose the folder is, until it is discarded."""
        (self.folder / FINGERPRINT).write_text("", encoding="utf-8")
        for file in self.folder.glob("*.pt"):
            file.unlink()

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove a store. Its fingerprint is spoilt first, so that half of one is never taken for a
        whole one, and goes last: it says whose this is.
        """
        if (folder / FINGERPRINT).is_file():
            (folder / FINGERPRINT).write_text("", encoding="utf-8")
        remove_folder(folder, last=FINGERPRINT)

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.pt").is_file()

    def save(self, name: str, value) -> None:
        """Keep tensors, numbers, strings and containers of them. Raises LrkvError where there is no
        room.
        """
        temporary = self.folder / f"{name}.tmp"
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # they take longer than the disk
        try:
            torch.save(value, temporary)
            os.replace(temporary, self.folder / f"{name}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise LrkvError(
                f"cannot keep the calibration in {self.folder}: {error}",
                "make room there, or give fewer --calibration-tokens",
            ) from error
        finally:
            torch.serialization.set_crc32_options(checksums)

    def load(self, name: str):
        """What was saved under that name, on the CPU; tensors are read from the disk when they are
        used.
        """
        return torch.load(
            self.folder / f"{name}.pt", weights_only=True, mmap=True, map_location="cpu"
        )

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.pt").unlink(missing_ok=True)
