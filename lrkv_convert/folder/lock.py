"""One process at a time in an unfinished folder; the system lets go of it when the process ends,
however that is."""

from pathlib import Path
from typing import TextIO

from ..errors import LrkvError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

LOCK = "lock"


class Lock:
    """What keeps others out until it is closed."""

    def __init__(self, file: TextIO | None):
        self.file = file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def claim(work: Path) -> Lock:
    """Keep other processes out of a run's working folder; of nothing where it is not there yet.
    Raises LrkvError if one is in it."""
    if fcntl is None or not work.is_dir():
        return Lock(None)
    # the lock lives as long as the file is open
    file = open(work / LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise LrkvError(
            f"another process is writing {work.parent}", "wait for it, or give another --out"
        ) from error
    return Lock(file)
