"""Every script in examples/ runs on a tiny model and says what it promises."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def example(name: str, *arguments, folder: Path) -> str:
    """What it prints; it must end well."""
    env = dict(
        os.environ,
        HF_HUB_OFFLINE="1",
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(
        "An example is a promise that somebody has typed it before you did. " * 60
    )
    return tmp_path / "text.txt"


def test_each_script_states_its_command():
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        assert f"python examples/{script.name}" in script.read_text().split('"""')[1]


@pytest.mark.slow
def test_convert_and_load(tiny, tmp_path):
    shown = example("convert_and_load.py", tiny(), folder=tmp_path)
    before, after = (
        int(n.replace(",", "")) for n in re.match(r"([\d,]+) -> ([\d,]+) bytes", shown).groups()
    )
    assert (
        before == 960
        and 0.1 * before < after <= 0.125 * before
        and "original: 'The capital" in shown
        and "lrkv: 'The capital" in shown
    )
    assert (tmp_path / "example-lrkv" / "lrkv.json").is_file()


@pytest.mark.slow
def test_read_the_spectrum(tiny, tmp_path):
    shown = example("read_the_spectrum.py", tiny(), "--target-kl", 100, folder=tmp_path)
    predicted = [float(kl) for kl in re.findall(r"predicted KL ([\d.]+)", shown)]
    assert (
        len(predicted) > 2
        and predicted == sorted(predicted, reverse=True)
        and "% of the energy of all values" in shown
        and "take --cache-ratio" in shown
    )
    assert (
        "no cache smaller"
        in example("read_the_spectrum.py", tiny(), "--target-kl", 0, folder=tmp_path)
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.slow
def test_choose_a_rank(tiny, text, tmp_path):
    shown = example(
        "choose_a_rank.py", tiny(), "--text", text, "--allow", 9, "--ranks", "3,7", folder=tmp_path
    )
    shares = [float(s) for s in re.findall(r"^ *([\d.]+)% of the cache", shown, re.M)]
    assert (
        len(shares) == 2
        and shares == sorted(shares)
        and f"take --cache-ratio {shares[0] / 100:.2f}" in shown
    )
    assert "none costs less" in example(
        "choose_a_rank.py", tiny(), "--text", text, "--allow", 0.5, "--ranks", "3", folder=tmp_path
    )


@pytest.mark.slow
def test_heal_and_compare(tiny, text, tmp_path):
    shown = example(
        "heal_and_compare.py",
        tiny(),
        "--data",
        text,
        "--text",
        text,
        "--tokens",
        2048,
        folder=tmp_path,
    )
    assert "2,048 tokens in" in shown and re.findall(r"(\w+): perplexity ×", shown) == [
        "model",
        "half",
        "healed",
    ]
    assert not list(tmp_path.glob("h*"))


@pytest.mark.slow
def test_serve_and_query(converted, tmp_path):
    pytest.importorskip("fastapi")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shown = example("serve_and_query.py", converted(), "--port", port, folder=tmp_path)
    assert "The capital of France is" in shown and "tokens, served from" in shown
