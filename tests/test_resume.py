"""A conversion that is stopped: nothing that looks whole is left, what took long is kept, and the
same command goes on to the same bytes.
"""

import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert import LrkvError, convert

runner = CliRunner()

CHILD = """
import resource, signal, sys
# a shell that runs the tests in the background lets children ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
limit = {limit}
if limit:       # a disk that fills up in mid-write: no file may grow beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import lrkv_convert.conversion as story
if {slow}:
    import time
    fit = story.fit_site
    def slowly(*a):
        print("fitting", flush=True)
        time.sleep(20)
        return fit(*a)
    story.fit_site = slowly
from lrkv_cli.main import app
sys.argv = ["lrkv", "convert", {source!r}, "--out", {out!r}, "--rank", "7", "--calibration", "none"]
app()
"""


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_write(source, tmp_path):
    code = CHILD.format(limit=50_000, slow=False, source=str(source), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    ), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_after_calibration_says_how_to_go_on(source, tmp_path, stop):
    """What took long is kept, and the same command takes it up; with other options it is begun
    anew.
    """
    code = CHILD.format(limit=0, slow=True, source=str(source), out=str(tmp_path / "out")).replace(
        '"--calibration", "none"', '"--calibration-tokens", "1024"'
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "fitting"
    time.sleep(0.2)
    child.send_signal(stop)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors
    assert (
        "interrupted" in errors
        and "same command" in errors
        and str(tmp_path / "out.partial") in errors
    )
    assert not (tmp_path / "out").exists() and list(
        (tmp_path / "out.partial" / "work").glob("moments-*.pt")
    )
    done = runner.invoke(
        app,
        [
            "convert",
            str(source),
            "--out",
            str(tmp_path / "out"),
            "--rank",
            "5",
            "--calibration",
            "none",
        ],
    )
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_nothing_looks_whole(source, tmp_path, stop):
    code = CHILD.format(limit=0, slow=True, source=str(source), out=str(tmp_path / "out"))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "fitting"
    time.sleep(0.2)
    child.send_signal(stop)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (130 if stop != signal.SIGKILL else -signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    if stop != signal.SIGKILL:
        assert "interrupted" in errors and "Traceback" not in errors
        assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_failure_in_mid_conversion_keeps_the_previous_output(source, tmp_path):
    """--overwrite replaces the old folder only once the new one is whole."""
    first = runner.invoke(
        app,
        [
            "convert",
            str(source),
            "--out",
            str(tmp_path / "out"),
            "--rank",
            "7",
            "--calibration",
            "none",
        ],
    )
    assert first.exit_code == 0, first.output
    before = (tmp_path / "out" / "lrkv.json").read_text()

    def fails(stage: str, *_) -> None:
        if stage == "converting":
            raise OSError(28, "No space left on device")

    with pytest.raises(LrkvError, match="No space left on device"):
        convert(
            str(source),
            tmp_path / "out",
            overwrite=True,
            progress=fails,
            rank=7,
            calibration_tokens=1024,
        )
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}
    assert (tmp_path / "out" / "lrkv.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, kept, bits",
    [
        ("forward", "layer-0", "16"),
        ("entering-2", "layer-1", "16"),
        ("moments-1", "layer-1", "16"),
        ("backward", "moments-1", "16"),
        ("curves-joint-self-0", "curves-joint-self-0", "16"),
        ("curves-joint-8-6-4-3-2-self-0", "curves-joint-8-6-4-3-2-self-0", "auto"),
        ("fitted-0", "fitted-0", "16"),
        ("fitted-0", "fitted-0", "auto"),
    ],
)
def test_a_killed_conversion_goes_on_and_ends_the_same(
    moment, kept, bits, tiny, converted, tmp_path
):
    """Killed right after `moment` was first saved: the second run does not work out again what was
    `kept`, and writes the same bytes.
    """
    code = f"""
import os, signal, torch
torch.set_num_threads({torch.get_num_threads()})
from lrkv_convert import convert
from lrkv_convert.folder.store import Store
save, seen = Store.save, []
def saves(self, name, value):
    save(self, name, value)
    seen.append(name)
    if name == {{kill!r}}: os.kill(os.getpid(), signal.SIGKILL)
Store.save = saves
convert({str(tiny())!r}, {str(tmp_path / "out")!r}, cache_ratio=0.5, bits={bits!r},
    calibration_tokens=1024)
print(" ".join(seen))
"""
    run = lambda kill: subprocess.run(
        [sys.executable, "-c", code.format(kill=kill)], capture_output=True, text=True
    )
    assert run(moment).returncode == -9 and not (tmp_path / "out").exists()
    done = run(None)
    assert done.returncode == 0, done.stderr
    assert kept not in done.stdout.split() and "fitted-1" in done.stdout.split()
    whole = converted(cache_ratio=0.5, rank=None, bits=bits)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"out"} and {
        p.name for p in (tmp_path / "out").iterdir()
    } == {p.name for p in whole.iterdir()}


def test_what_was_left_of_another_conversion_is_not_used(tiny, converted, tmp_path):
    from lrkv_convert.folder.store import Store

    store = Store(tmp_path / "out.partial" / "work", {"options": "others"})
    store.save("fitted-0", {"keys": 0.0, "values": 0.0})
    for stray in ("model-00001-of-00002.safetensors", "modeling_lrkv_gpt2.py"):
        (tmp_path / "out.partial" / stray).write_text("old")
    convert(str(tiny()), tmp_path / "out", rank=7, calibration_tokens=1024)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        converted() / "model.safetensors"
    ).read_bytes()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in converted().iterdir()}
