"""The model card: what the hub reads of it, commands that give the folder again, what it cost; and
the way to the hub.
"""

import json
import shlex
from dataclasses import replace

import pytest
import yaml
from conftest import SETTINGS, run
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from lrkv_convert import LrkvError, convert
from lrkv_convert.folder import hub
from lrkv_convert.folder.provenance import commands
from lrkv_convert.folder.record import read_record

PASSAGE = (
    "Whoever pays by the byte learns to write short letters, and to keep the long ones to himself. "
    * 12
)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "letters.txt"
    file.write_text(PASSAGE)
    return file


def card(folder) -> str:
    return (folder / "README.md").read_text()


@pytest.fixture
def licensed(source):
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: sheep-1.0\nlicense_link: LICENSE\nlanguage:\n-"
        " en\ndatasets: [secret]\n---\n# Sheep\n"
    )
    (source / "LICENSE").write_text("Do as sheep do.")
    return source


def test_metadata_is_what_the_hub_reads(licensed, tmp_path):
    convert(str(licensed), tmp_path / "out", rank=7, calibration=[])
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.license_link, data.language) == (
        "other",
        "sheep-1.0",
        "LICENSE",
        ["en"],
    )
    assert (data.library_name, data.pipeline_tag, data.tags) == (
        "transformers",
        "text-generation",
        ["lrkv", "kv-cache"],
    )
    # where a path comes from, nobody can say
    assert data.get("datasets") is None and data.base_model is None
    assert (
        tmp_path / "out" / "LICENSE"
    ).read_text() == "Do as sheep do." and "The licence of the source, other, applies." in card(
        tmp_path / "out"
    )


@pytest.mark.parametrize(
    "spoilt", ["---\nlicense: [\n---\n", "no front matter", "---\n- a list\n---\n", "---"]
)
def test_a_source_with_a_spoilt_card_is_converted(spoilt, source, tmp_path):
    (source / "README.md").write_text(spoilt)
    convert(str(source), tmp_path / "out", rank=7, calibration=[])
    assert (
        "no card beside the weights named one" in card(tmp_path / "out")
        and ModelCard.load(tmp_path / "out" / "README.md").data.license is None
    )


def test_a_source_from_the_hub_is_the_base_model(converted):
    from lrkv_convert.folder.card import metadata

    record = read_record(converted())
    record = replace(record, source=replace(record.source, name="org/name"))
    assert metadata(record, {}, "x")["base_model"] == "org/name" and commands(record, "x")[
        0
    ].startswith("lrkv convert org/name --out x ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 7, "calibration_tokens": 1024},
        {
            "rank_k": 3,
            "rank_v": 9,
            "base_width_v": 30,
            "keys": "per-head",
            "refit": False,
            "calibration": ["letters.txt"],
        },
        {
            "cache_ratio": 0.6,
            "max_width_k": 16,
            "dtype": "bfloat16",
            "calibration": ["letters.txt", "built-in"],
            "calibration_tokens": 1024,
        },
        {"rank": 5, "base": "aligned", "metric": "attention", "calibration": []},
    ],
    ids=["rank", "sides", "budget", "bare"],
)
def test_the_commands_of_the_card_give_the_same_weights(
    options, source, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    convert("source", "out", **options)
    [command] = commands(read_record(tmp_path / "out"), "again")
    assert command.replace("again", "out") in card(tmp_path / "out")
    run(*shlex.split(command)[1:])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(
        (first[name] == second[name]).all() for name in first
    )


def test_the_commands_of_a_healed_card_give_the_same_weights(source, sheep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(sheep.read_text())
    run("convert", "source", "--rank", 5, "--calibration", "none", "--out", "half")
    run(
        "heal",
        "half",
        "--data",
        "text.txt",
        "--out",
        "healed",
        "--teacher",
        "source",
        "--tokens",
        512,
        "--train",
        "all",
        "--set",
        *SETTINGS,
        "tokens=512",
    )
    lines = commands(read_record(tmp_path / "healed"), "again")
    assert len(lines) == 2 and all(
        line.replace("again", "healed") in card(tmp_path / "healed") for line in lines
    )
    for line in lines:
        run(*shlex.split(line)[1:])
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("healed", "again")
    )
    assert all((first[name] == second[name]).all() for name in first)


def test_the_picture_of_the_cache_is_in_the_card(converted):
    assert (converted() / "cache.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "](cache.png)" in card(converted())


def test_without_matplotlib_there_is_none(tiny, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else find(name, *a),
    )
    convert(str(tiny()), tmp_path / "out", rank=7, calibration=[])
    assert not (tmp_path / "out" / "cache.png").exists() and "cache.png" not in card(
        tmp_path / "out"
    )


# -------------------------------------------------------------------------------------- evaluations


def test_compare_writes_what_it_measured_into_the_card(tiny, source, text, tmp_path):
    out, other = tmp_path / "out", tmp_path / "b.txt"
    other.write_text(PASSAGE.upper())
    convert(str(source), out, rank=7, calibration=[])
    assert "Not measured yet" in card(out)
    measured = ["compare", source, out, "--seq-len", 150, "--card"]
    run(*measured, "--text", text, other, "--cache", "int8", "--json", tmp_path / "c.json")
    row = next(
        r
        for r in json.loads((tmp_path / "c.json").read_text())["models"]
        if r["path"] == str(out) and not r["cache"]
    )
    assert (
        f"| {row['perplexity']:.3f} | ×{row['ratio']:.4f}"
        f" ({row['ratio_low']:.4f}–{row['ratio_high']:.4f}) |"
        in card(out)
        and "Not measured" not in card(out)
    )
    found = ModelCard.load(out / "README.md").data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in found] == [
        (t["name"], "perplexity", round(t["perplexity"], 4)) for t in row["texts"]
    ]
    run(*measured, "--text", text, other)  # again: replaced, not repeated
    assert len(json.loads((out / "lrkv.json").read_text())["evaluations"]) == 1
    run(*measured, "--text", text)
    assert (
        len(json.loads((out / "lrkv.json").read_text())["evaluations"]) == 2
        and card(out).count("| model | perplexity | ratio (95 % interval) |") == 2
    )
    assert not (source / "lrkv.json").exists()


def test_a_card_is_written_for_folders_of_ours_only(tiny, text):
    assert (
        "none of these is a converted folder"
        in run("compare", tiny(), tiny("llama-bias"), "--text", text, "--card", code=1).stderr
    )


def test_the_name_of_the_source_does_not_depend_on_where_one_stands(
    source, text, tmp_path, monkeypatch
):
    """A relative path looks like a hub id from elsewhere."""
    (tmp_path / "models").mkdir()
    source.rename(tmp_path / "models" / "smol")
    monkeypatch.chdir(tmp_path)
    convert("models/smol", "out", rank=7, calibration=[])
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    run("compare", "../models/smol", "../out", "--text", text, "--seq-len", 64, "--card")
    assert "base_model" not in card(tmp_path / "out") and "lrkv convert smol --out out" in card(
        tmp_path / "out"
    )


def test_a_card_for_the_folder_one_stands_in_has_its_name(source, text, tmp_path, monkeypatch):
    convert(str(source), tmp_path / "out", rank=7, calibration=[])
    monkeypatch.chdir(tmp_path / "out")
    run("compare", source, ".", "--text", text, "--seq-len", 64, "--card")
    assert card(tmp_path / "out").count("\n# out\n") == 1


def test_a_picture_that_fails_costs_no_conversion(tiny, tmp_path, monkeypatch):
    from lrkv_convert import plot

    monkeypatch.setattr(plot, "cache", lambda *a: 1 / 0)
    convert(str(tiny()), tmp_path / "out", rank=7, calibration=[])
    assert not (tmp_path / "out" / "cache.png").exists() and "cache.png" not in card(
        tmp_path / "out"
    )


def test_healing_forgets_what_was_measured_before(source, text, sheep, tmp_path):
    convert(str(source), tmp_path / "half", rank=5, calibration=[])
    run("compare", source, tmp_path / "half", "--text", text, "--seq-len", 64, "--card")
    run(
        "heal",
        tmp_path / "half",
        "--data",
        sheep,
        "--out",
        tmp_path / "healed",
        "--set",
        *SETTINGS,
        "tokens=512",
    )
    assert (
        "evaluations" in (tmp_path / "half" / "lrkv.json").read_text()
        and "evaluations" not in (tmp_path / "healed" / "lrkv.json").read_text()
    )
    assert "Not measured yet" in card(tmp_path / "healed")


# --------------------------------------------------------------------------------------- to the hub


class Url(str):
    repo_id = "org/half-lrkv"


class Api:
    """A hub that notes what it is asked."""

    asked: list = []

    def create_repo(self, repository, private, exist_ok):
        self.asked.append(("repo", repository, private, exist_ok))
        return Url("https://hub/org/half-lrkv")

    def create_branch(self, repository, branch, exist_ok):
        self.asked.append(("branch", repository, branch, exist_ok))

    def create_commit(self, repo_id, operations, *, commit_message, revision):
        files = {}
        for operation in operations:
            with operation.as_file() as stream:
                files[operation.path_in_repo] = stream.read()
        self.asked.append(("commit", repo_id, files, commit_message, revision))


@pytest.fixture
def account(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    Api.asked = []


def test_push_makes_the_repository_and_commits_the_folder(converted, account):
    """The name is the one the hub gives: without an organisation, the user's."""
    assert (
        run(
            "push",
            converted(),
            "half-lrkv",
            "--private",
            "--branch",
            "half",
            "--message",
            "half a cache",
        ).stdout.strip()
        == "https://hub/org/half-lrkv"
    )
    repo, branch, (_, where, files, message, revision) = Api.asked
    assert (repo, branch) == (
        ("repo", "half-lrkv", True, True),
        ("branch", "org/half-lrkv", "half", True),
    ) and (where, message, revision) == ("org/half-lrkv", "half a cache", "half")
    assert (
        files.keys() == {file.name for file in converted().iterdir()}
        and files["model.safetensors"] == (converted() / "model.safetensors").read_bytes()
    )
    assert (
        b'from_pretrained("org/half-lrkv"' in files["README.md"]
        and b"lrkv serve org/half-lrkv" in files["README.md"]
    )


def test_what_is_pushed_names_no_path_of_this_machine(source, text, sheep, tmp_path, account):
    convert(str(source), tmp_path / "half", rank=5, calibration=[str(text)])
    run(
        "heal",
        tmp_path / "half",
        "--data",
        sheep,
        "--out",
        tmp_path / "healed",
        "--set",
        *SETTINGS,
        "tokens=512",
        f"validation=[{text}]",
    )
    run("compare", source, tmp_path / "healed", "--text", text, "--seq-len", 64, "--card")
    run("push", tmp_path / "healed", "org/x")
    files = Api.asked[-1][2]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    # where healing finds the original again
    assert str(tmp_path) in (tmp_path / "healed" / "lrkv.json").read_text()


def test_without_an_account_it_says_how_to_log_in(converted, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "hf auth login" in run("push", converted(), "org/name", code=1).stderr


def test_what_is_no_converted_folder_is_not_pushed(tiny, tmp_path):
    for folder in (tiny(), tmp_path, tmp_path / "nowhere"):
        assert "is no converted folder" in run("push", folder, "org/name", code=1).stderr


@pytest.mark.parametrize("name", ["a/b/c", "org/name"])
def test_a_push_that_fails_is_one_line(name, converted, monkeypatch):
    """A name that is none; a network that refuses."""
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(LrkvError, match=f"cannot upload to {name}"):
        hub.push(converted(), name)


def test_the_front_of_the_card_is_yaml(converted):
    assert card(converted()).startswith("---\n") and isinstance(
        yaml.safe_load(card(converted()).split("---")[1]), dict
    )
