"""`lrkv heal` and `lrkv recipes` as users type them."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import SETTINGS, build, log, run

from lrkv_convert.settings.recipe import KINDS, shipped
from lrkv_convert.train.options import Options


def refused(*arguments, says: str, out: Path) -> None:
    """The command must fail with one line containing `says` and leave no trace of `out`."""
    before = sorted(p.name for p in out.parent.iterdir())
    line = run("heal", *arguments, "--out", out, code=1).stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "; " in line and says in line, line
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy of a converted folder that may be spoilt."""
    return Path(shutil.copytree(converted(), tmp_path / "lrkv"))


def test_the_table_shows_before_and_after(converted, sheep, tmp_path):
    result = run(
        "heal", converted(), "--data", sheep, "--out", tmp_path / "out", "--set", *SETTINGS
    )
    entry = json.loads((tmp_path / "out" / "lrkv.json").read_text())["history"][0]
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for name in ("original", "converted", "healed"):
        assert f"{math.exp(entry['validation']['nll'][name]):.3f}" in rows[name]
    assert "tokens/s" in result.stdout and f"next: lrkv compare {entry['teacher']}" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100 and "\x1b" not in result.stdout
    # no terminal: a line before, and per validation
    assert result.stderr.count("held-out perplexity") == 3 and result.stderr.count("left") == 2
    assert "between what was trained on" in result.stdout or "did not help" in result.stdout
    assert entry["recipe"]["name"] == "short"


def test_a_validation_text_is_named_and_a_healing_that_does_not_help_says_so(
    converted, sheep, tmp_path
):
    (tmp_path / "own.txt").write_text("nothing of the kind, " * 40)
    shown = run(
        "heal",
        converted(),
        "--data",
        sheep,
        "--out",
        tmp_path / "out",
        "--set",
        *SETTINGS,
        f"validation={tmp_path / 'own.txt'}",
        "muon_lr=0.5",
        "adamw_lr=0.5",
    ).stdout
    assert shown.startswith("own.txt ") and "Healing did not help" in shown
    assert "tokens of own.txt:" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("width", [60, 100])
def test_the_bar_keeps_step_loss_ratio_and_time_on_narrow_terminals(width, monkeypatch):
    import io

    from rich.console import Console

    from lrkv_cli import display
    from lrkv_cli.display import training

    stream = io.StringIO()
    monkeypatch.setattr(
        training,
        "console_for",
        lambda stderr=False: Console(
            file=stream, width=width, force_terminal=True, legacy_windows=False, highlight=False
        ),
    )
    with display.healing() as (report, stage, _notice):
        stage("training")
        for step in (20, 40):
            report(
                {
                    "step": step,
                    "steps": 97,
                    "tokens": step * 2048,
                    "loss": 0.0597,
                    "tokens_per_second": 226.4,
                    "validation_ratio": 1.023,
                }
            )
    last = [
        line for line in stream.getvalue().replace("\r", "\n").splitlines() if "training" in line
    ][-1]
    for figure in ("40/97", "loss 0.0597", "held out ×1.0230"):
        assert figure in last


def test_json_is_the_entry(converted, sheep, tmp_path):
    shown = run(
        "heal",
        converted(),
        "--data",
        sheep,
        "--out",
        tmp_path / "out",
        "--set",
        *SETTINGS,
        "--json",
    ).stdout
    assert (
        json.loads(shown) == json.loads((tmp_path / "out" / "lrkv.json").read_text())["history"][0]
    )


def test_flags_override_settings_and_settings_the_recipe(converted, sheep, tmp_path):
    (tmp_path / "r.yaml").write_text("muon_lr: 0.001\nadamw_lr: 0.003\ntokens: 99999\nloss: mix\n")
    run(
        "heal",
        converted(),
        "--data",
        sheep,
        "--out",
        tmp_path / "out",
        "--recipe",
        tmp_path / "r.yaml",
        "--set",
        *SETTINGS,
        "adamw_lr=2e-3",
        "--tokens",
        512,
        "--loss",
        "ce",
    )
    recipe = json.loads((tmp_path / "out" / "lrkv.json").read_text())["history"][0]["recipe"]
    assert (recipe["muon_lr"], recipe["adamw_lr"], recipe["tokens"], recipe["loss"]) == (
        0.001,
        0.002,
        512,
        "ce",
    )


def test_a_tracker_is_taken_if_it_is_installed_and_gets_the_curve(
    converted, sheep, tmp_path, monkeypatch
):
    from lrkv_convert.train import launch

    asked = []
    monkeypatch.setattr(launch, "is_trackio_available", lambda: False)
    monkeypatch.setattr(launch, "is_tensorboard_available", lambda: False)
    assert launch.choose_tracker("auto") is None and launch.choose_tracker("none") is None
    refused(
        converted(),
        "--data",
        sheep,
        "--set",
        *SETTINGS,
        "tracker=tensorboard",
        says="pip install tensorboard",
        out=tmp_path / "out",
    )
    monkeypatch.setattr(launch, "is_tensorboard_available", lambda: True)
    assert launch.choose_tracker("auto") == launch.choose_tracker("tensorboard") == "tensorboard"
    monkeypatch.setattr(launch, "is_trackio_available", lambda: True)
    assert launch.choose_tracker("auto") == "trackio"
    made, real = [], launch.Accelerator
    monkeypatch.setattr(
        launch,
        "Accelerator",
        lambda log_with, **options: (made.append(log_with), real(**options))[1],
    )
    monkeypatch.setattr(
        real, "log", lambda self, values, step: asked.append((step, values["loss"]))
    )
    run(
        "heal",
        converted(),
        "--data",
        sheep,
        "--out",
        tmp_path / "out",
        "--set",
        *SETTINGS,
        "tracker=tensorboard",
    )
    assert made == ["tensorboard"]
    assert asked == [
        (line["step"], line["loss"]) for line in log(tmp_path / "out") if "loss" in line
    ]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, says",
    [
        (["muon_lrr=1e-3"], "did you mean muon_lr?"),
        (["muon_lr"], "write name=value"),
        (["muon_lr=fast"], "muon_lr is 'fast'"),
        (["muon_lr=1e300"], "at most 1,000"),
        (["muon_lr=-1"], "must be positive"),
        (["muon_lr=.nan"], "muon_lr is nan"),
        (["tokens=0"], "at least 1"),
        (["tokens=1.5"], "whole number"),
        (["seq_len=1"], "at least 2"),
        (["loss=huber"], "choose from auto, kl, ce, mix"),
        (["warmup=2"], "between 0 and 1"),
        (["beta2=1.0"], "never forgets"),
        (["match_attention=.inf"], "at least 0"),
        (["seed=-1"], "between 0"),
        (["seed=99999999999"], "between 0"),
        (["gradient_checkpointing=1"], "true or false"),
        (["micro_batch_size=3"], "does not divide"),
        (["tokens=100"], "less than one step"),
        (["optimizer=sgd"], "muon, adamw"),
        (["seq_len=1024", "tokens=99999"], "longer than"),
        (["validation=3"], "a list of files"),
        (["validation=a.txt"], "no such file"),
        (["text_field=["], "not YAML"),
    ],
)
def test_impossible_settings_are_refused(converted, sheep, tmp_path, settings, says):
    refused(
        converted(), "--data", sheep, "--set", *SETTINGS, *settings, says=says, out=tmp_path / "out"
    )


def test_a_recipe_with_a_field_that_does_not_exist_names_the_nearest(converted, sheep, tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rat: 1\nmuonlr: 0.1\n")
    refused(
        converted(),
        "--data",
        sheep,
        "--recipe",
        tmp_path / "r.yaml",
        says="learning_rat, muonlr (did you mean muon_lr?); known: ",
        out=tmp_path / "out",
    )
    refused(
        converted(), "--data", sheep, "--recipe", "shrt", says="shipped: ", out=tmp_path / "out"
    )


def test_data_that_is_no_use_is_refused(converted, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    for name in ("empty.txt", "short.txt"):
        refused(
            converted(), "--data", tmp_path / name, says="empty or too short", out=tmp_path / "out"
        )
    refused(
        converted(), "--data", tmp_path / "nowhere.txt", says="no such file", out=tmp_path / "out"
    )


def test_a_folder_that_is_not_lrkv_is_refused(tiny, sheep, tmp_path):
    refused(tiny(), "--data", sheep, says="lrkv convert MODEL --out DIR", out=tmp_path / "out")
    refused(tmp_path / "nowhere", "--data", sheep, says="there is no folder", out=tmp_path / "out")


def test_the_output_must_not_be_the_input_or_something_else(converted, sheep, folder, tmp_path):
    arguments = ("--data", sheep, "--set", *SETTINGS)
    refused(folder, *arguments, says="is the input", out=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(folder, *arguments, "--overwrite", says="something other", out=tmp_path / "mine")
    run("heal", folder, *arguments, "--out", tmp_path / "out")
    refused(folder, *arguments, says="exists", out=tmp_path / "out")
    run("heal", folder, *arguments, "--out", tmp_path / "out", "--overwrite")


def test_teachers_that_do_not_belong_are_refused(converted, sheep, tiny, tmp_path, monkeypatch):
    import families
    from transformers import LlamaConfig

    monkeypatch.setitem(
        families.CONFIGS, "larger", lambda: LlamaConfig(**{**families.ROPE, "vocab_size": 300})
    )
    arguments = (converted(), "--data", sheep, "--set", *SETTINGS)
    refused(
        *arguments,
        "--teacher",
        build("larger", tmp_path / "larger"),
        says="another vocabulary",
        out=tmp_path / "out",
    )
    other = Path(shutil.copytree(tiny(), tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    a, b = '"a":', '"b":'
    (other / "tokenizer.json").write_text(text.replace(a, "\0").replace(b, a).replace("\0", b))
    refused(*arguments, "--teacher", other, says="tokenizer of the teacher", out=tmp_path / "out")
    refused(
        *arguments, "--teacher", tmp_path / "nowhere", says="no such model", out=tmp_path / "out"
    )


def test_a_loss_that_needs_the_original_is_refused_without_it(folder, sheep, tmp_path):
    record = json.loads((folder / "lrkv.json").read_text())
    (folder / "lrkv.json").write_text(
        json.dumps(record | {"source": record["source"] | {"path": str(tmp_path / "gone")}})
    )
    for extra in (["loss=kl"], ["loss=mix"], ["match_attention=0.1"]):
        refused(
            folder,
            "--data",
            sheep,
            "--set",
            *SETTINGS,
            *extra,
            says="needs the original model",
            out=tmp_path / "out",
        )


def test_without_the_original_it_says_so_before_it_trains_on_cross_entropy(folder, sheep, tmp_path):
    record = json.loads((folder / "lrkv.json").read_text())
    (folder / "lrkv.json").write_text(
        json.dumps(record | {"source": record["source"] | {"path": str(tmp_path / "gone")}})
    )
    shown = run(
        "heal", folder, "--data", sheep, "--set", *SETTINGS, "--out", tmp_path / "out"
    ).stderr
    assert (
        f"note: the original is not at {tmp_path / 'gone'}: training on cross-entropy"
        in shown.splitlines()[0]
    )


def test_what_is_wrong_is_said_before_training(converted, sheep, tmp_path):
    refused(
        converted(),
        "--data",
        sheep,
        "--max-shard-size",
        "5G",
        says="5GB or 500MB",
        out=tmp_path / "out",
    )
    refused(
        converted(),
        "--data",
        sheep,
        "--device",
        "cuda:1",
        says="CUDA_VISIBLE_DEVICES",
        out=tmp_path / "out",
    )


def test_broken_folders_are_refused(folder, sheep, tmp_path):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refused(
        folder,
        "--data",
        sheep,
        "--set",
        *SETTINGS,
        says="truncated or corrupt",
        out=tmp_path / "out",
    )
    (folder / "lrkv.json").write_text("{")
    refused(folder, "--data", sheep, says="not JSON", out=tmp_path / "out")


def test_a_batch_that_does_not_divide_among_processes_is_refused():
    from lrkv_convert import LrkvError

    assert Options(batch_size=8, micro_batch_size=2).accumulation(2) == 2
    for processes in (3, 8):
        with pytest.raises(LrkvError, match=f"does not divide among {processes} processes"):
            Options(batch_size=8, micro_batch_size=2).accumulation(processes)


# ------------------------------------------------------------------------------------------ recipes


def test_recipes_are_listed_with_their_commands_and_printed():
    shown = run("recipes").stdout
    for kind in KINDS:
        for name, text in shipped(kind).items():
            assert (
                f"{kind}/{name}" in shown
                and text.splitlines()[0].removeprefix("# ").split()[0] in shown
            )
            assert run("recipes", f"{kind}/{name}").stdout == text
    # where the header breaks a command, the list does not
    assert "\\" not in shown and "--out DIR2 --recipe large --optimizer adamw\n" in shown
    assert run("recipes", "standard").stdout == shipped("heal")["standard"]
    assert "did you mean" in run("recipes", "standart", code=1).stderr


@pytest.mark.parametrize("name", list(shipped("heal")))
def test_shipped_recipes_are_possible_and_explain_every_field(name):
    text = shipped("heal")[name]
    found = yaml.safe_load(text)
    Options(**found).check()
    assert set(found) == {field.name for field in fields(Options)}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert "# " in line, line


def test_the_recipe_short_is_the_default():
    assert Options(**yaml.safe_load(shipped("heal")["short"])) == Options()


@pytest.mark.parametrize("name", list(shipped("accelerate")))
def test_accelerate_reads_its_configurations(name, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    (tmp_path / "c.yaml").write_text(shipped("accelerate")[name])
    config = load_config_from_file(str(tmp_path / "c.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
