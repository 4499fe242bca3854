"""Where outputs go: what cannot be written is said in one line before the work, and nothing that is
somebody else's is ever removed or written over."""

import errno
import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SETTINGS, refused, run

from lrkv_convert import LrkvError, convert
from lrkv_convert.folder import writer
from lrkv_convert.folder.places import check_file, check_folder
from lrkv_convert.folder.store import Store
from lrkv_convert.folder.writer import check_ours, new_folder, publish, write_json, write_text


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def here(source, tmp_path, monkeypatch) -> Path:
    """A folder with things in it, where one stands."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, target in (
        ("to_folder", "empty"),
        ("to_file", "file"),
        ("to_nowhere", "nowhere"),
        ("in_a_circle", "in_a_circle"),
    ):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OUTPUTS = {
    ".": "is run in",
    "..": "is run in",
    "./": "is run in",
    "/": "is run in",
    "source/..": "is run in",
    "x" * 300: "too long",
    "x" * 250: "too long",
    "字" * 100: "too long",
    "new/" + "y" * 300 + "/z": "too long",
    "/dev/full": "no folder",
    "/dev/null": "no folder",
    "/dev/full/x": "in its place",
    "file": "is a file",
    "file/": "is a file",
    "file/x": "in its place",
    "file/x/y": "in its place",
    "to_folder": "a link",
    "to_file": "a link",
    "to_nowhere": "a link",
    "in_a_circle": "a link",
    "to_nowhere/x": "leads nowhere",
    "to_file/x": "in its place",
    "/proc/x": "cannot write",
    "/proc/x/y": "cannot write",
    "~nobody-here/x": "not there",
    "~": "exists",
    "b\udcff": "not UTF-8",
}


@pytest.mark.parametrize("out, says", OUTPUTS.items())
def test_an_output_that_cannot_be_is_one_line(out, says, here):
    before = tree(here)
    line = run(
        "convert", "source", "--rank", "7", "--calibration", "none", f"--out={out}", code=1
    ).stderr.strip()
    assert len(line.splitlines()) == 1 and says in line and line.startswith("error: "), line
    assert tree(here) == before


def test_a_healing_is_refused_the_same_places(here, converted):
    for out, says in OUTPUTS.items():
        line = run("heal", converted(), "--data", "file", f"--out={out}", code=1).stderr.strip()
        assert len(line.splitlines()) == 1 and says in line, line


def test_a_system_that_is_read_only(here, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    refused("source", Path("out"), says="Read-only file system")
    with pytest.raises(LrkvError, match="Read-only"):
        check_folder(Path("empty"))


@pytest.mark.parametrize("out", ["empty", "new/deep/out/", "-x", "n\nl字$a$", "~/out"])
def test_unusual_names_are_names(out, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "empty"))
    run("convert", "source", "--rank", "7", "--calibration", "none", f"--out={out}")
    assert (Path(out).expanduser() / "lrkv.json").is_file() and not list(here.rglob("*.partial"))


# ---------------------------------------------------------------------------------- what is ours


def fill(folder: Path, name: str, link: bool) -> None:
    if name == "a file":
        folder.write_text("thesis")
    elif link:
        (folder.parent / "elsewhere").mkdir()
        (folder.parent / "elsewhere" / "thesis.txt").write_text("years of work")
        folder.symlink_to(folder.parent / "elsewhere")
    else:
        (folder / "work").mkdir(parents=True)
        (folder / "work" / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("end", [".partial", ".previous"])
@pytest.mark.parametrize("what", ["a file", "a link", "a folder"])
def test_what_somebody_else_made_is_left_alone(what, end, source, converted, sheep, tmp_path):
    fill(tmp_path / f"out{end}", what, link=what == "a link")
    before = tree(tmp_path)
    refused(source, tmp_path / "out", says="in the way")
    line = run(
        "heal", converted(), "--data", sheep, "--out", tmp_path / "out", "--set", *SETTINGS, code=1
    ).stderr
    assert "in the way" in line and len(line.strip().splitlines()) == 1
    assert tree(tmp_path) == before


def test_a_run_of_heal_is_not_a_conversions_to_remove(source, tmp_path):
    (tmp_path / "out.partial" / "work").mkdir(parents=True)
    write_json(tmp_path / "out.partial" / "work" / "heal.json", {})
    refused(source, tmp_path / "out", says="a run of heal that stopped")


@pytest.mark.parametrize(
    "left",
    ["nothing", "an empty folder", "a working folder", "a lock", "a spoilt mark"],
)
def test_what_a_killed_run_leaves_is_ours(left, source, tmp_path):
    """A run may be killed between any two steps of its beginning and its end."""
    partial = tmp_path / "out.partial"
    if left != "nothing":
        partial.mkdir()
    if left in ("a working folder", "a lock", "a spoilt mark"):
        (partial / "work").mkdir()
    if left == "a lock":
        (partial / "work" / "lock").touch()
    if left == "a spoilt mark":
        (partial / "work" / "run.json").touch()
        (partial / "model.safetensors").write_text("half")
    convert(str(source), tmp_path / "out", rank=7, calibration=[])
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"} and not (
        tmp_path / "out" / "work"
    ).exists()


@pytest.mark.parametrize("removed", range(4))
def test_a_removal_that_was_cut_short_is_known_as_ours(removed, source, tmp_path, monkeypatch):
    """Whatever was removed when the process was killed, the mark is still there."""
    partial = tmp_path / "out.partial"
    store = Store(partial / "work", {"of": "another"})
    store.save("layer-0", 1)
    (partial / "model.safetensors").write_text("half")

    class Killed(BaseException):
        pass

    count, real = [0], os.unlink

    def dies(path, missing_ok=False):
        count[0] += 1
        if count[0] > removed:
            raise Killed
        real(path)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Path, "unlink", dies)
        writer.discard(partial)
    if partial.exists():
        check_ours(partial)
    convert(str(source), tmp_path / "out", rank=7, calibration=[])
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_two_processes_do_not_write_one_folder(source, tmp_path):
    code = f"""
from pathlib import Path
from lrkv_convert.folder.writer import new_folder
with new_folder(Path({str(tmp_path / "out")!r}), {{}}):
    print("in", flush=True)
    input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "in\n"
        before = tree(tmp_path)
        with pytest.raises(LrkvError, match="another process is writing"):
            convert(str(source), tmp_path / "out", rank=7, calibration=[])
        assert tree(tmp_path) == before
    finally:
        other.communicate("\n", timeout=60)


def test_a_name_that_was_taken_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(LrkvError, match=r"by now.*the result lies in .*out.partial"),
        new_folder(tmp_path / "out", {}) as (folder, _),
    ):
        (folder / "lrkv.json").write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert (tmp_path / "out" / "thesis.txt").is_file() and (
        tmp_path / "out.partial" / "lrkv.json"
    ).is_file()


@pytest.mark.parametrize("file", ["thesis.txt", "lrkv.json"])
def test_a_previous_of_somebody_else_is_not_used(file, tmp_path):
    """A model that the user set aside is not one that this package did."""
    for name, content in (
        ("out", "lrkv.json"),
        ("out.partial", "lrkv.json"),
        ("out.previous", file),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text(name)
    publish(tmp_path / "out.partial", tmp_path / "out")
    assert (tmp_path / "out" / "lrkv.json").read_text() == "out.partial"
    assert (tmp_path / "out.previous" / file).read_text() == "out.previous"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.previous"}


def test_a_replacement_that_was_cut_short_is_taken_up(source, tmp_path):
    """Killed when the old model was set aside and the new one had no name yet: the next run removes
    what was set aside, once it is whole itself.
    """
    convert(str(source), tmp_path / "out", rank=7, calibration=[])
    (tmp_path / "out" / ".lrkv-replaced").touch()
    (tmp_path / "out").rename(tmp_path / "out.previous")
    convert(str(source), tmp_path / "out", rank=6, calibration=[])
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path):
    class Unwritable:
        def __str__(self) -> str:
            raise OSError(28, "No space left on device")

    with (
        pytest.raises(LrkvError, match="No space left on device"),
        new_folder(tmp_path / "new" / "out", {"options": Unwritable()}),
    ):
        pass
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "file, says",
    [
        ("/dev/full", "a device"),
        ("/dev/zero", "a device"),
        ("nowhere/f", "does not exist"),
        ("file/f", "does not exist"),
        ("empty", "a folder"),
        (".", "a folder"),
        ("x" * 300, "too long"),
        ("/proc/f", "cannot write"),
        ("to_nowhere/f", "does not exist"),
        ("in_a_circle", "cannot write"),
        ("~nobody-here/f", "not there"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_before_anything_is_measured(file, says, here):
    before = tree(here)
    for arguments in (
        ["compare", "source", "source", "--text", "file", f"--json={file}"],
        ["compare", "source", "source", "--text", "file", f"--report={file}"],
        ["eval", "source", "--text", "file", f"--json={file}"],
        ["bench", "source", f"--json={file}"],
        ["bench", "source", f"--png={file}"],
    ):
        line = run(*arguments, code=1).stderr.strip()
        assert len(line.splitlines()) == 1 and says in line, line
    assert tree(here) == before


@pytest.mark.parametrize(
    "out, says",
    [
        ("/dev/full", "in its place"),
        ("file", "in its place"),
        ("file/x", "in its place"),
        ("to_nowhere", "leads nowhere"),
        ("/proc/x", "cannot write"),
        ("x" * 300, "too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_measured(out, says, here):
    for arguments in (["inspect", "source"], ["sweep", "source", "--text", "file"]):
        line = run(*arguments, f"--out={out}", code=1).stderr.strip()
        assert len(line.splitlines()) == 1 and says in line, line


def test_a_disk_that_is_full(here, monkeypatch):
    """Before; and where it fills up while something is measured."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.NamedTemporaryFile", full)
        with pytest.raises(LrkvError, match="No space left"):
            check_file(Path("result.json"), "--json")
    (here / "text.txt").write_text("Sheep are counted one by one. " * 40)
    monkeypatch.setattr(os, "replace", full)
    for option in ("--json", "--report"):
        result = run(
            "compare",
            "source",
            "source",
            "--text",
            "text.txt",
            "--seq-len",
            "64",
            option,
            "result",
            code=1,
        )
        assert (
            result.stderr.strip().splitlines()
            == [
                "error: cannot write result: No space left on device; "
                "check permissions and free space"
            ]
            and "perplexity" in result.stdout
        )
    assert not list(here.glob("result*"))


def test_pipes_and_devices_are_written_into_and_stay(here):
    os.mkfifo("pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE, text=True)
    write_json(Path("pipe"), {"a": 1})
    assert json.loads(reader.communicate(timeout=10)[0]) == {"a": 1} and stat.S_ISFIFO(
        os.stat("pipe").st_mode
    )
    assert check_file(Path(os.devnull), "--json") == Path(os.devnull)
    write_json(Path("to_file"), {})
    assert Path("to_file").is_symlink() and Path("file").read_text() == "{}\n"


def test_json_and_report_are_two_files(here):
    assert (
        "are the same file"
        in run(
            "compare", "source", "source", "--text", "file", "--json", "a", "--report", "a", code=1
        ).stderr
    )


def test_a_picture_of_an_unknown_kind_is_refused_first(here):
    assert "let it end in" in run("bench", "source", "--png", "p.sheep", code=1).stderr


def test_what_stands_in_the_file_behind_an_open_stream_stays(tmp_path):
    """--json /dev/stdout where stdout is a file, which holds the table already."""
    with open(tmp_path / "log", "w") as stream:
        stream.write("a table\n")
        stream.flush()
        write_text(Path(f"/dev/fd/{stream.fileno()}"), "{}\n")
    assert (tmp_path / "log").read_text() == "a table\n{}\n"
