"""Where things are written: what a user may name, told before minutes of work rather than after
them, and nothing of anybody else's touched."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LrkvError

LONGEST = 255  # bytes of a name, on the file systems of today
HINT = "check permissions and free space"
PROBE = bytes(1 << 16)  # what a disk must have room for, if it has any


def folder_to_make(name: str | Path) -> Path:
    """The folder a user names to be made or replaced as a whole. Raises LrkvError for a name that
    can be none."""
    path = expanded(name, ending=".previous")
    if not str(name) or within(Path.cwd(), path):
        raise LrkvError(
            f"the output {str(name)!r} is the folder this is run in, or holds it",
            "give the name of a folder that does not exist yet",
        )
    return path if path.name not in ("", "..") else path.resolve()


def expanded(name: str | Path, ending: str = "") -> Path:
    """A path with ~ for what it stands for; ending: what its name must have room for.

    Raises LrkvError for names that no file can have.
    """
    try:
        path = Path(name).expanduser()
        os.path.abspath(path).encode("utf-8")  # in cards and records it must stand, too
    except RuntimeError as error:
        raise LrkvError(
            f"{name} begins with the home of a user who is not there", "give the whole path"
        ) from error
    except UnicodeError as error:
        raise LrkvError(f"the name {os.fsencode(name)!r} is not UTF-8", "give another") from error
    if long := [part for part in path.parts if len(part.encode()) > LONGEST - len(ending)]:
        raise LrkvError(
            f"the name {long[0][:24]}… is too long: {len(long[0].encode())} bytes",
            f"give one of at most {LONGEST - len(ending)}",
        )
    return path


def within(path: Path, folder: Path) -> bool:
    """Whether `path` is this folder, or lies in it."""
    try:
        path, folder = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle lead nowhere
        return False
    return path == folder or folder in path.parents


def check_folder(folder: Path, what: Path | None = None) -> None:
    """Raise LrkvError where this folder is not there and cannot be made, or nothing can be written
    into it; what: that is to be written, if not the folder."""
    with writing(what or folder):
        if folder.is_symlink() and not folder.exists():
            raise LrkvError(
                f"cannot write {folder}: it is a link that leads nowhere", "give another --out"
            )
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not place.is_dir():
            raise LrkvError(
                f"cannot write {folder}: a file is in its place"
                + ("" if place == folder else f", {place}"),
                "give another --out",
            )
        # permissions alone do not tell of systems that are read-only
        os.rmdir(tempfile.mkdtemp(prefix=".lrkv-", dir=place))


def check_file(name: Path, option: str) -> Path:
    """The file a user names with this option. Raises LrkvError where it cannot be written."""
    file = expanded(name, ending=".tmp")
    with writing(file):
        if file.is_dir():
            raise LrkvError(f"cannot write {file}: it is a folder", f"give {option} a file in it")
        if special(file):
            if (
                stat.S_ISCHR(file.stat().st_mode)
                and os.path.realpath(file) != os.devnull
                and not os.path.realpath(file).startswith(("/dev/pts/", "/dev/tty"))
            ):
                raise LrkvError(f"cannot write {file}: it is a device", f"give {option} a file")
            return file
        if not file.parent.is_dir():
            raise LrkvError(
                f"cannot write {file}: its folder does not exist or is not writable",
                "make it first",
            )
        try:
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".lrkv-") as probe:
                probe.write(PROBE)
        except PermissionError as error:
            raise LrkvError(
                f"cannot write {file}: its folder does not exist or is not writable",
                "make it first",
            ) from error
    return file


def special(file: Path) -> bool:
    """Whether this is a pipe, a device or a link, which nothing may be put in place of: it is
    written into."""
    return file.is_symlink() or file.exists() and not file.is_file()


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Whatever the system says against writing there becomes a refusal."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads on: no failure of ours
            raise
        raise LrkvError(f"cannot write {what}: {error.strerror or error}", HINT) from error


def remove_folder(folder: Path, last: str) -> None:
    """Remove a folder of ours, the file that says so last: of one half removed it is known whose it
    was."""
    if folder.is_dir():
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == last):
            remove(entry)
        folder.rmdir()


def remove(entry: Path) -> None:
    """A file, a link or a folder."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
