"""One process at a time in an unfinished folder; the system lets go of it when the process ends,
however that is."""

from pathlib import Path
from typing import TextIO

from .errors import LrkvError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

LOCK = "lock"


def claim(work: Path) -> TextIO | None:
    """Keep other processes out of a run's working folder until the file that is returned is closed;
    None where it is not there. Raises LrkvError if one is in it."""
    if fcntl is None or not work.is_dir():
        return None
    lock = open(work / LOCK, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise LrkvError(
            f"another process is writing {work.parent}", "wait for it, or give another --out"
        ) from error
    return lock
