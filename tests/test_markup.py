"""Names of folders, texts and models are anybody's words. In a card, a terminal and a picture they
stand as themselves: no markup, no formula, no escape sequence."""

import copy
import json
import shlex
import subprocess
import warnings

import pytest
import yaml
from conftest import refused, run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lrkv_convert import LrkvError
from lrkv_convert.folder.card import model_card, source_metadata
from lrkv_convert.folder.markup import block, cell, code, literal, prose, quoted
from lrkv_convert.format import Record

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
HOSTILE = [
    "<svg onload=alert(1)>",
    "</code><script>x</script>",
    "a`b",
    "``",
    "`",
    "a|b",
    "[x](javascript:alert(1))",
    "](javascript:alert(1))",
    "![x](http://x/y.png)",
    "<!-- x",
    "# x",
    "- x",
    "1. x",
    "> x",
    "---",
    "===",
    "*x* __y__ _z_ ~~w~~",
    "a\nb",
    "a\n\n# b",
    "a\n---\nb: c",
    "a: b",
    "'\"",
    "\\",
    "\\`",
    "&lt;b&gt;",
    "$x$",
    "\x1b[31mred",
    "\u202egnp",
    "@x: {y}",
    "```",
    "```\n<b>",
    "~~~",
    " x ",
    "{name}",
    "%s",
    "!tag",
    "é 字 🐑",
]


def inline(markdown: str) -> str:
    """The text a reader sees, where nothing is anything but text or code."""
    [_, token, _] = MARKDOWN.parse(markdown)
    assert {child.type for child in token.children} <= {
        "text",
        "code_inline",
        "text_special",
    }, token.children
    return "".join(child.content for child in token.children)


def seen(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_reader_sees_is_the_name(text):
    assert inline(prose(text)) == " ".join(seen(text).split())
    assert inline(f"It is {prose(text)} here") == f"It is {' '.join(seen(text).split())} here"
    assert inline(code(text)).strip() == seen(text).strip()
    rendered = MARKDOWN.render(f"| a | b |\n|---|---|\n| {prose(text)} | {cell(text)} |\n")
    assert (
        rendered.count("<td>") == 2
        and rendered.count("<tr>") == 2
        and "<svg" not in rendered
        and "<script" not in rendered
    )
    [fence] = MARKDOWN.parse(block("bash", text))
    assert fence.type == "fence" and fence.content == text + "\n"
    assert eval(literal(text)) == text
    assert (
        subprocess.run(["bash", "-c", f"printf %s {quoted([text])}"], capture_output=True).stdout
        == text.encode()
        or "\u202e" in text
    )
    assert "\n" not in prose(text) + code(text) + cell(text) + quoted([text]) + literal(text)


def test_ordinary_names_stay_as_they_are():
    for name in (
        "smollm2-135m",
        "my_model",
        "org/name",
        "0.1.0",
        "letters.txt",
        "a b",
        "2026-01-01",
    ):
        assert prose(name) == name and code(name) == f"`{name}`"
        assert quoted([name]) == shlex.quote(name)


def spoil(content, text):
    """Every word in a record becomes this one."""
    if isinstance(content, dict):
        return {
            key: value if key in ("model_type", "kind", "optimizer", "loss") else spoil(value, text)
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [spoil(value, text) for value in content]
    return text if isinstance(content, str) else content


@pytest.fixture(scope="module")
def record(converted, tiny, sheep, tmp_path_factory) -> dict:
    """Of a folder that was healed and measured."""
    folder = tmp_path_factory.mktemp("card")
    run(
        "heal",
        converted(),
        "--data",
        sheep,
        "--out",
        folder / "healed",
        "--set",
        "tokens=256",
        "seq_len=64",
        "batch_size=1",
        "validation_tokens=64",
        "tracker=none",
    )
    run(
        "compare",
        tiny(),
        folder / "healed",
        "--text",
        sheep,
        "--seq-len",
        64,
        "--max-tokens",
        128,
        "--card",
    )
    return json.loads((folder / "healed" / "lrkv.json").read_text())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_of_hostile_names_is_the_same_card(text, record, tmp_path):
    plain = model_card(Record.from_json(record), {}, "out")
    spoilt = Record.from_json(spoil(record, text))
    hostile = model_card(spoilt, {"license": text, "language": [text]}, text)
    body = lambda card: MARKDOWN.parse(card.split("\n---\n", 1)[1])
    assert [token.type for token in body(hostile)] == [token.type for token in body(plain)]
    children = [child for token in body(hostile) for child in token.children or []]
    assert {child.type for child in children} <= {
        "text",
        "text_special",
        "code_inline",
        "softbreak",
        "strong_open",
        "strong_close",
        "image",
    }
    assert {child.attrs["src"] for child in children if child.type == "image"} <= {
        "cache.png",
        "heal.png",
    }
    (tmp_path / "README.md").write_text(hostile)
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=True).data
    assert (
        data.license == text
        and data.language == [text]
        and data.tags == ["lrkv", "kv-cache"]
        and source_metadata(tmp_path)["license"] == text
    )
    assert (
        yaml.safe_load(
            hostile.split("---\n")[1]
            if "---" not in text
            else hostile[4 : hostile.index("\n---\n")]
        )["library_name"]
        == "transformers"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("attention"),
        lambda r: r.update(attention={}),
        lambda r: r.update(attention={"<b>": r["attention"]["self"]}),
        lambda r: r["attention"]["self"].pop("cache"),
        lambda r: r["attention"]["self"].update(cache=None),
        lambda r: r["attention"]["self"].update(layers={}),
        lambda r: r["attention"]["self"].update(layers=[1]),
        lambda r: r.update(history="x"),
        lambda r: r["source"].update(model_type="sheep"),
        lambda r: r.update(source=None),
        lambda r: r["attention"]["self"]["layers"][0]["keys"].update(rank="<b>"),
        lambda r: r["attention"]["self"]["layers"][0]["keys"].update(error="<b>"),
        lambda r: r["calibration"].update(tokens="x"),
        lambda r: r.update(evaluations=[{}]),
        lambda r: r.update(evaluations=7),
        lambda r: r["history"][0]["validation"]["nll"].update(healed=1e6),
        lambda r: r.update(recipe=[]),
        lambda r: r["recipe"].update(calibration=7),
        lambda r: r["history"][0]["recipe"].pop("train"),
    ],
)
def test_a_record_that_others_edited_is_refused_or_harmless(change, record):
    edited = copy.deepcopy(record)
    change(edited)
    try:
        assert "<b>" not in model_card(Record.from_json(edited), {}, "out")
    except LrkvError as refusal:
        assert "is not as lrkv convert wrote it" in str(refusal)


@pytest.mark.parametrize("content", ["[]", "null", "{", "{}", '{"cache": null}', '"x"'])
def test_a_broken_record_is_one_line_before_anything_is_measured(
    content, tiny, converted, sheep, tmp_path
):
    import shutil

    folder = shutil.copytree(converted(), tmp_path / "out")
    (folder / "lrkv.json").write_text(content)
    for option in (["--card"], ["--report", tmp_path / "r.html"], []):
        result = run("compare", tiny(), folder, "--text", sheep, *option, code=1)
        assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: 2024-13-45\n---\n",
        "---\nlicense: {a: <b>}\nlanguage: [1]\n---\n",
        "---\nlicense: " + "[" * 5000 + "\n---\n",
        "---\n" + "a: &a [x]\n" + "license: [*a, *a]\n---\n",
    ],
)
def test_a_source_card_with_odd_values_is_passed_over(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert source_metadata(tmp_path) == {}


# ------------------------------------------------------------------------- terminal and pictures

NAMES = ["[red]x\x1b[31my", "$x$ $字🐑", "_x:sheep:\ny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_and_draws_names_as_they_are(name, tiny, sheep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    text = tmp_path / name / f"{name}.txt"
    text.write_text(sheep.read_text())
    out = f"{name}/{name}"
    shown = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shown.append(run("convert", tiny(), "--rank", 7, "--calibration", "none", "--out", out))
        assert (tmp_path / out / "cache.png").is_file()
        shown.append(
            run(
                "compare",
                tiny(),
                out,
                "--text",
                text,
                "--seq-len",
                64,
                "--max-tokens",
                256,
                "--report",
                f"{out}.html",
                "--json",
                f"{out}.json",
                "--card",
            )
        )
        shown.append(run("bench", tiny(), out, "--tokens", 64, "--steps", 1, "--png", f"{out}.png"))
        shown.append(
            run("inspect", out, "--text", text, "--max-tokens", 128, "--out", f"{out}-look")
        )
        from lrkv_convert import plot

        point = dict(method="lrkv", metric="fisher", rank=3, cache_ratio=0.5, ratio=1.01)
        plot.frontier(
            {"points": [point], "knee": None, "model": out, "text": {"name": name}, "tokens": 10},
            tmp_path / "sweep.png",
        )
        refusal = run("convert", f"{name}/nowhere", "--out", "o", code=1)
    assert not [
        str(w.message)
        for w in warned
        if "lyph" in str(w.message) or "font" in str(w.message).lower()
    ]
    assert len(refusal.stderr.strip().splitlines()) == 1
    for result in (*shown, refusal):
        assert "\x1b" not in result.stdout + result.stderr and "lyph" not in result.stderr
        assert (
            seen(name)
            in (result.stdout + result.stderr).replace("\\n", "\n" if "\n" in name else "\\n")
            or "\n" in name
        )


def test_a_name_with_escape_sequences_is_harmless_in_a_refusal(source, tmp_path):
    assert "\\x1b[2J" in refused(source, tmp_path / "out", "--recipe", "\x1b[2J", says="no recipe")
