"""`lrkv inspect` as it is typed: its tables at every width, what it writes, what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert.inspection import inspect, save


def lines_without_commands(shown: str) -> list[str]:
    """What is for reading: a command to copy and the names of files are not folded."""
    return [line for line in shown.splitlines() if not line.startswith(("next: ", "written: "))]


def test_a_look_ahead_from_the_command_line(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny().parent)
    shown = run("inspect", "model", "--calibration-tokens", 1024, "--out", tmp_path / "look").stdout
    result = json.loads((tmp_path / "look" / "inspect.json").read_text())
    assert (
        max(map(len, lines_without_commands(shown))) <= 100
        and "\x1b" not in shown
        and "…" not in shown
    )
    found = result["attention"]["self"]
    assert (
        f"{found['ranks'][3]['predicted_kl']:.3f}" in shown
        and "fidelity" in shown
        and "ceiling 83.3%" in shown
    )
    assert (
        len(found["layers"]) == 2
        and len(found["layers"][0]["keys"]["singular_values"]) == 3
        and len(found["layers"][0]["values"]["outside_base"]) == 3
    )
    assert str(tiny().parent) not in json.dumps(result)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "look" / "heads.png").stat().st_size > 10_000


def test_a_converted_folder_beside_its_original_from_the_command_line(
    tiny, converted, tmp_path, monkeypatch
):
    monkeypatch.chdir(converted().parent)
    shown = run("inspect", "model", "--max-tokens", 64, "--out", tmp_path / "look").stdout
    result = json.loads((tmp_path / "look" / "inspect.json").read_text())
    assert max(map(len, lines_without_commands(shown))) <= 100 and "\x1b" not in shown
    assert (
        f"similarity {result['attention']['self']['similarity']:.3f}" in shown
        and "calibrated on" in shown
        and result["tokens"] == 64
    )
    assert str(tiny().parent) not in json.dumps(result) and str(
        converted().parent
    ) not in json.dumps(result)
    (tmp_path / "other.txt").write_text("Nobody has calibrated on this. " * 9)
    shown = run(
        "inspect",
        "model",
        "--original",
        tiny(),
        "--text",
        tmp_path / "other.txt",
        "--max-tokens",
        64,
    ).stdout
    assert "calibrated on" not in shown and "other.txt" in shown
    pytest.importorskip("matplotlib")
    assert (tmp_path / "look" / "heads.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("which", ["original", "converted"])
def test_a_narrow_terminal_loses_no_figure(which, tiny, converted, tmp_path):
    env = dict(os.environ, COLUMNS="60", FORCE_COLOR="1", TERM="xterm-256color")
    model = (
        [str(tiny()), "--calibration-tokens", "512"]
        if which == "original"
        else [str(converted()), "--max-tokens", "64"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "lrkv_cli.main", "inspect", *model],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert (
        max(map(len, lines_without_commands(plain))) <= 60
        and "…" not in plain
        and "diversity" in plain.lower()
    )


def test_without_matplotlib_the_json_is_written(tiny, tmp_path, monkeypatch):
    result = inspect(str(tiny()), ranks=[5], calibration_tokens=512)
    monkeypatch.setitem(sys.modules, "lrkv_convert.inspection.plots", None)
    monkeypatch.delattr("lrkv_convert.inspection.plots", raising=False)
    assert [f.name for f in save(result, tmp_path / "look")] == ["inspect.json"]


def refusal(*arguments) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exit_code == 1, done.output + repr(done.exception)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "; " in line
    return line


@pytest.mark.parametrize(
    "options, says",
    [
        (["--ranks", "5", "21"], "rank 21 is out of range"),
        (["--ranks", "5,x"], "not numbers"),
        (["--ablate"], "--text"),
        (["--original", "somewhere"], "is not converted"),
        (["--calibration", "nowhere.txt"], "cannot read"),
        (["--calibration", "none"], "without calibration text"),
        (["--text", "nowhere.txt", "--ablate"], "cannot read"),
        (["--device", "abacus"], "cannot be used"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(options, says, tiny):
    assert says in refusal(tiny(), *options)


def test_a_text_of_one_token_is_refused(tiny, converted, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for model, more in ((tiny(), ["--ablate"]), (converted(), [])):
        assert "too short" in refusal(model, "--text", tmp_path / "a.txt", *more)


def test_what_is_no_model_is_refused(tmp_path):
    assert "no such model" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("hello")
    assert "no config.json" in refusal(tmp_path / "notes")
    assert "holds 2 texts" in refusal(tmp_path / "notes", "--text", two_texts(tmp_path), "--ablate")


def two_texts(folder: Path) -> Path:
    (folder / "two").mkdir()
    for name in "ab":
        (folder / "two" / f"{name}.txt").write_text(name)
    return folder / "two"


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "look"):
        assert "a file is in its place" in refusal(tiny(), "--out", out)


def test_a_converted_folder_without_its_original_says_so(tiny, converted, tmp_path):
    folder = Path(shutil.copytree(converted(), tmp_path / "alone"))
    record = json.loads((folder / "lrkv.json").read_text())
    record["source"]["path"] = str(tmp_path / "gone")
    (folder / "lrkv.json").write_text(json.dumps(record))
    assert "is not where it was" in refusal(folder) and "--original" in refusal(folder)
    (folder / "lrkv.json").unlink()
    assert "does not say what it was converted from" in refusal(folder)
    assert "family or shapes differ" in refusal(folder, "--original", tiny("gpt2"))
    assert "already an LRKV model" in refusal(folder, "--original", converted())
    assert "compared with its original" in refusal(folder, "--original", tiny(), "--ranks", "5")
    assert run("inspect", folder, "--original", tiny(), "--max-tokens", 32).exit_code == 0


def test_weights_that_are_not_finite_are_not_looked_at(source, converted, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for arguments in ([source], [converted(), "--original", source]):
        assert "up_proj.weight contains NaN or Inf" in refusal(*arguments)


def test_what_a_decoder_does_not_read_is_refused(tiny, converted, tmp_path):
    for option in ("--pairs", "--audio"):
        assert "has no encoder" in refusal(tiny(), "--ablate", option, tmp_path)
        assert "has no encoder" in refusal(converted(), option, tmp_path)


def test_what_was_found_in_the_source_is_said(source, converted):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for arguments in (
        [source, "--calibration-tokens", 512, "--ranks", 5],
        [converted(), "--original", source, "--max-tokens", 32],
    ):
        done = run("inspect", *arguments)
        assert "note: lm_head.weight differs" in done.stderr and "note: " not in done.stdout
