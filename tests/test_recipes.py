"""Options, wherever they come from, are read one way: a value is of the type its field says, or one
line names the field, the value and what is expected."""

import re
from dataclasses import asdict, fields

import pytest
from conftest import refused, run

from lrkv_cli.docs import commands
from lrkv_convert import LrkvError, convert
from lrkv_convert.fit.bases import BASES
from lrkv_convert.fit.metric import METRICS
from lrkv_convert.folder.provenance import _setting
from lrkv_convert.forms import FORMS
from lrkv_convert.plan import options as conversion
from lrkv_convert.plan.spend import Budget, Uniform
from lrkv_convert.settings.fields import LARGEST, said
from lrkv_convert.settings.plain_yaml import parse
from lrkv_convert.settings.recipe import load_recipe, read_fields, shipped
from lrkv_convert.train import options as healing

EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list[str]: "a list of files",
}
WRONG = {
    int: [True, "7", 4.5, float("nan"), float("inf"), LARGEST, [7], {}],
    float: [True, "0.5", float("nan"), [0.5]],
    bool: [1, "nein", 0.0],
    str: [3, ["joint"], True],
    list[str]: [3, [1], [""], "", {"a": 1}],
}


def kinds(field) -> tuple:
    return getattr(field.type, "__args__", (field.type,))


@pytest.mark.parametrize("options", [conversion.Options, healing.Options])
def test_every_field_refuses_values_of_every_other_type(options):
    for field in fields(options):
        wanted = [kind for kind in kinds(field) if kind is not type(None)]
        for value in WRONG[wanted[0]] if len(wanted) == 1 else [True, 1.5, [1]]:
            with pytest.raises(LrkvError) as refusal:
                options(**{field.name: value})
            assert refusal.value.message.startswith(f"{field.name} is ") and all(
                EXPECTED[kind] in refusal.value.hint for kind in wanted
            ), (field.name, value)
            assert len(str(refusal.value)) < 200
        if type(None) not in kinds(field):
            with pytest.raises(LrkvError, match=f"{field.name} is None"):
                options(**{field.name: None})


def test_numbers_are_what_they_count():
    assert (
        conversion.Options(calibration_tokens=1e4).calibration_tokens == 10000
        and conversion.Options(cache_ratio=1).cache_ratio == 1.0
    )
    assert (
        conversion.Options(calibration="a.txt").calibration == ["a.txt"]
        and conversion.Options(calibration="none").calibration
        == conversion.Options(calibration=["none"]).calibration
        == []
    )
    assert healing.Options(validation=("a", "b")).validation == ["a", "b"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rank": 4.5}, "rank is 4.5"),
        ({"refit": "nein"}, "refit is 'nein'"),
        ({"keys": ["joint"]}, "keys is"),
    ],
)
def test_the_library_refuses_in_the_same_words(options, says, tiny, tmp_path):
    with pytest.raises(LrkvError, match=says):
        convert(str(tiny()), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- what fields say


def test_choices_are_what_the_fit_knows():
    """They are written out in the options, which are read without torch."""
    known = {"base": BASES, "metric": METRICS, "keys": {*FORMS, conversion.AUTO}}
    for name, choices in known.items():
        assert set(said(conversion.Options.given()[name]).choices) == set(choices)


@pytest.mark.parametrize(
    "command, options", [("convert", conversion.Options), ("heal", healing.Options)]
)
def test_every_field_has_help_and_is_a_flag_unless_advanced(command, options):
    parameters = {p.name: p for p in commands()[command].params}
    for field in fields(options):
        about = said(field)
        assert about.help[-1] == "." and "\n" not in about.help
        if not about.given or about.advanced:
            assert field.name == "recipe" or field.name not in parameters
        else:
            flag = parameters[field.name]
            assert flag.default is None and flag.help.startswith(about.help), field.name
            assert flag.multiple == (list[str] in kinds(field))


@pytest.mark.parametrize("options", [conversion.Options, healing.Options])
def test_every_field_refuses_what_is_beyond_its_choices_and_limits(options):
    for name, field in options.given().items():
        about = said(field)
        bad = ["taste"] * bool(about.choices) + [v for v in (-1, 2**40) if about.limits]
        refusals = []
        for value in bad:
            try:
                options(**{name: value}).check_fields()
            except LrkvError as refusal:
                refusals.append(refusal)
        assert bool(refusals) == bool(bad), name
        for refusal in refusals:
            assert refusal.hint and "{" not in refusal.message


@pytest.mark.parametrize("name", shipped("heal"))
def test_recipes_for_healing_say_every_field_as_its_help_does(name):
    text = shipped("heal")[name]
    comments = dict(re.findall(r"^(\w+): .*?  +# (.*)$", text, re.M))
    comments |= dict(re.findall(r"^(\w+): \S+ # (.*)$", text, re.M))
    assert comments == {name: said(field).help for name, field in healing.Options.given().items()}
    healing.Options(**load_recipe(name, "heal", set(comments))).check()


def test_the_recipe_short_is_the_default():
    assert load_recipe("short", "heal", set(healing.Options.given())) == asdict(healing.Options())


@pytest.mark.parametrize(
    "asked, spend",
    [
        ({}, Budget(0.25, (8, 6, 4, 3, 2))),
        ({"bits": "16"}, Budget(0.5)),
        ({"bits": "2,8"}, Budget(0.25, (8, 2))),
        ({"cache_ratio": 0.4, "bits": "4"}, Budget(0.4, (4,))),
        ({"keys": "rotary"}, Budget(0.5)),
        ({"keys": "full"}, Budget(0.75)),
        ({"cache_ratio": 0.4, "max_width_v": 64}, Budget(0.4, max_width_v=64)),
        ({"rank": 7, "base_width_k": 20}, Uniform(rank=7, width_k=20)),
        ({"rank": 8, "bits": "8"}, Uniform(rank=8, bits=8)),
        ({"base": "mean"}, Uniform()),
        ({"metric": "plain"}, Uniform()),
        ({"calibration": "none"}, Uniform()),
    ],
)
def test_a_conversion_spends_a_budget_or_the_same_everywhere(asked, spend):
    options = conversion.Options(**asked)
    assert options.spend == spend and options.record()["cache_ratio"] == spend.ratio


# ------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("1E6", 1e6),
        ("-2.5e+1", -25.0),
        ("5e-4", 5e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("7", 7),
        ("1_000", 1000),
        ("-3", -3),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
        ("[a, 1e2]", ["a", 100.0]),
        (".inf", float("inf")),
        ("=", "="),
    ],
)
def test_plain_values_mean_what_they_look_like(text, value):
    assert parse(text, "it", "") == value and type(parse(text, "it", "")) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        1e-5,
        0.0005,
        "1e5",
        "010",
        "no",
        "a b",
        ["x", "1e3"],
        "a: b",
        3,
        True,
        None,
        "\x1b",
        "é",
        "[",
        "*a",
    ],
)
def test_the_commands_of_a_card_set_what_was_set(value):
    assert read_fields([f"a={_setting(value)}"], {"a"}) == {"a": value}


SPOILT = {
    "not UTF-8": b"rank: \xff",
    "UTF-16": "rank: 7".encode("utf-16"),
    "empty": b"",
    "a comment": b"# rank: 7",
    "a list": b"- rank",
    "a word": b"rank",
    "null": b"null",
    "no fields": b"{}",
    "twice": b"rank: 3\nrank: 4",
    "a tag": b"rank: !!int '3'",
    "code": b"rank: !!python/object/apply:os.system ['touch harm']",
    "an alias": b"rank: &a [1]\nkeys: *a",
    "itself": b"&a rank: [*a]",
    "laughs": b"a: &a [x]\nb: &b [*a,*a]",
    "deep": b"rank: " + b"[" * 20000,
    "digits": b"rank: " + b"9" * 5000,
    "two": b"rank: 1\n---\nrank: 2",
    "NUL": b"rank: 7\0",
    "a list as name": b"? [a]\n: 1",
    "large": b"rank: 7\n#" + b"x" * 100000,
    "a number as name": b"1: 2",
    "a merge": b"<<: {rank: 7}",
    "not closed": b"rank: [",
    "tabs": b"rank:\t7\n\tx",
}


@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_recipe_is_one_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(content)
    for kind, allowed in (("convert", {"rank", "keys"}), ("heal", {"tokens"})):
        with pytest.raises(LrkvError, match="r.yaml") as refusal:
            load_recipe("r.yaml", kind, allowed)
        assert len(str(refusal.value)) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    "name, says",
    [
        (".", "is a folder"),
        ("nowhere.yaml", "no recipe"),
        ("x" * 300, "too long"),
        ("~nobody-here/r.yaml", "cannot be read"),
        ("/dev/zero", "no recipe"),
        ("\x1b[31m", r"no recipe '\\x1b"),
    ],
)
def test_a_name_that_is_no_recipe_is_one_line(name, says, tmp_path):
    with pytest.raises(LrkvError, match=says):
        load_recipe(name, "convert", {"rank"})


def test_a_recipe_of_the_wrong_type_is_refused_by_the_command(source, tmp_path):
    (tmp_path / "r.yaml").write_text("cache_ratio: '0.5'\n")
    assert "it must be a number" in refused(
        source, tmp_path / "out", "--recipe", str(tmp_path / "r.yaml"), says="cache_ratio is '0.5'"
    )


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "M", "--out", "o", "--rank", "9" * 30],
        ["convert", "M", "--out", "o", "--rank", "4.5"],
        ["convert", "M", "--out", ""],
        ["convert", "M", "--out="],
        ["convert", "", "--out", "o"],
        ["convert", "M", "--out", "o", "--cache-ratio", "nan"],
        ["convert", "M", "--out", "o", "--calibration", " "],
        ["inspect", "M", "--target-kl", "inf"],
        ["inspect", "M", "--out", ""],
        ["compare", "M", "M", "--text", "t", "--cache", ""],
        ["compare", "M", "M", "--text", "t", "--seq-len", "9" * 30],
        ["compare", "M", "M", "--text", "t", "--batch-size", "0"],
        ["compare", "M", "M", "--tasks", ","],
        ["sweep", "M", "--text", "t", "--out", "o", "--max-tokens", "9" * 30],
        ["bench", "M", "--steps", "9" * 20],
        ["heal", "M", "--data", "", "--out", "o"],
        ["demo", "--cache-ratio", "inf"],
        ["serve", ""],
        ["recipes", ""],
        ["push", "M", ""],
        ["eval", "M", "--foo"],
        ["--foo"],
        ["cnvert"],
        ["convert"],
    ],
    ids=" ".join,
)
def test_arguments_that_mean_nothing_are_one_line(arguments):
    lines = run(*arguments, code=2).stderr.strip().splitlines()
    assert (
        len(lines) == 1
        and lines[0].startswith("error: ")
        and "--help says more" in lines[0]
        and "Traceback" not in lines[0]
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["compare", "M", "M", "--text", "T", "--cache", "int3"], "choose from fp8, int8, int4"),
        (
            ["sweep", "M", "--text", "T", "--out", "O", "--ranks", "7", "--seq-len", "90000"],
            "longer than",
        ),
        (["compare", "M", "M", "--text", "T", "--samples", "1000000000"], "more than the"),
        (["bench", "M", "--tokens", "64", "--batch", "1000000000"], "no memory"),
        (["bench", "M", "--tokens", "9" * 30], "too large"),
        (["bench", "M", "--tokens", "64", "--steps", "10000000"], "fewer --steps"),
        (
            [
                "convert",
                "M",
                "--out",
                "O",
                "--calibration",
                "self",
                "--calibration-tokens",
                "99999999999",
            ],
            "more than a model can",
        ),
        (["convert", "M", "--out", "O", "--max-shard-size", "0GB"], "0GB"),
        (["convert", "M", "--out", "O", "--device", "meta"], "'meta' cannot be used"),
        (["sweep", "M", "--text", "x" * 300, "--out", "O"], "too long"),
        (["compare", "M", "M", "--text", "~nobody-here/t"], "a user who is not there"),
        (["heal", "M", "--data", "x" * 300, "--out", "O"], "error: "),
    ],
)
def test_what_no_model_can_do_is_one_line(arguments, says, tiny, sheep, tmp_path):
    places = {"M": tiny(), "T": sheep, "O": tmp_path / "out"}
    lines = run(*(places.get(word, word) for word in arguments), code=1).stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0] and not list(tmp_path.iterdir())
