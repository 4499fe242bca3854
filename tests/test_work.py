"""Which form of keys `--keys auto` takes, and what a dry run says of each."""

import json
from types import SimpleNamespace

import pytest
from conftest import refused, run

from lrkv_convert import LrkvError, convert
from lrkv_convert.families import FAMILIES, Geometry, Site
from lrkv_convert.forms import FORMS, Shape
from lrkv_convert.plan.options import Options

LLAMA = FAMILIES["llama"].any
CONFIG = SimpleNamespace(model_type="llama")
BIG = Geometry(width=4096, kv_heads=8, groups=4, head_dim=128, rotary_dim=128)
WIDE = Geometry(width=4096, kv_heads=64, groups=4, head_dim=128, rotary_dim=128)
ONE = Geometry(width=2048, kv_heads=1, groups=8, head_dim=256, rotary_dim=256)
PARTIAL = Geometry(width=4096, kv_heads=8, groups=4, head_dim=128, rotary_dim=64)
NORMED = Geometry(width=4096, kv_heads=8, groups=4, head_dim=128, rotary_dim=128, key_norm=True)
STILL = Geometry(width=4096, kv_heads=8, groups=4, head_dim=128, rotary_dim=0)


def allowed(work: str | None, *geometries: Geometry) -> set[str]:
    """Names of the forms that may be chosen."""
    sites = [
        Site(i, "self", LLAMA.module(i).rstrip("."), LLAMA, g) for i, g in enumerate(geometries)
    ]
    return set(Options(keys="auto", work=work).forms_for(sites, CONFIG))


@pytest.mark.parametrize(
    "work, geometry, names",
    [
        ("quality", BIG, {"joint", "per-head", "commuting", "channels"}),
        ("balanced", BIG, {"per-head", "commuting", "channels"}),
        (None, BIG, {"per-head", "commuting", "channels"}),
        ("latency", BIG, {"commuting", "channels"}),
        ("8", BIG, {"channels"}),
        ("128", BIG, {"per-head", "commuting", "channels"}),
        ("128", WIDE, {"per-head", "channels"}),
        ("1024", BIG, {"joint", "per-head", "commuting", "channels"}),
        ("latency", PARTIAL, {"channels"}),
        ("balanced", ONE, {"joint", "per-head", "commuting", "channels"}),
        ("quality", NORMED, {"joint", "per-head"}),
        ("balanced", NORMED, {"per-head"}),
        ("latency", STILL, {"joint"}),
    ],
)
def test_forms_within_a_limit_of_work(work, geometry, names):
    assert allowed(work, geometry) == names


def test_layers_that_differ_have_a_form_that_goes_with_all():
    assert allowed("latency", BIG, PARTIAL, STILL) == {"channels"}
    with pytest.raises(LrkvError, match="--work latency.*per-head, 128 multiply-adds"):
        allowed("latency", BIG, NORMED)


def test_the_effort_of_forms_is_in_the_order_of_their_work():
    """All of a key kept."""
    order, work, effort = ["channels", "commuting", "per-head", "joint"], {}, {}
    for name in order:
        width, rank = (0, 128) if name == "per-head" else (1024, 0)
        codes = (((8, width),), None) if width else (None, ((8, rank),))
        work[name] = FORMS[name].work(Shape(width, rank, name, codes), BIG)
        effort[name] = FORMS[name].effort(BIG)
    assert sorted(effort, key=effort.__getitem__) == sorted(work, key=work.__getitem__) == order
    # about so many for each of 1024 cached numbers
    for name in order:
        assert 0.9 < work[name] / 1024 / effort[name] < 1.3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_form_is_the_one_of_which_least_is_lost(family, tiny, tmp_path):
    given = dict(cache_ratio=0.25, calibration_tokens=1024)
    dry = convert(str(tiny(family)), tmp_path / "out", dry_run=True, keys="auto", **given)
    forms = dry.forms["self"]
    assert set(forms) == set(allowed("quality", PARTIAL if family == "gpt_neox" else BIG))
    assert all(plan.ratio <= 0.25 and plan.keys == name for name, plan in forms.items())
    rebuilt_least = {name: p.predicted_kl for name, p in forms.items() if name != "joint"}
    assert dry.plan.keys == min(rebuilt_least, key=rebuilt_least.__getitem__)
    assert dry.plan == forms[dry.plan.keys] and dry.plan.predicted_kl > 0
    done = convert(str(tiny(family)), tmp_path / "out", keys="auto", **given)
    assert done.plan == dry.plan
    record = json.loads((tmp_path / "out" / "lrkv.json").read_text())
    assert record["attention"]["self"]["keys"] == dry.plan.keys
    assert record["recipe"]["keys"] == "auto"
    named = convert(str(tiny(family)), tmp_path / "named", keys=dry.plan.keys, **given)
    assert named.plan == done.plan


def test_keys_that_do_not_turn_are_joint(tiny, tmp_path):
    """And a dry run has nothing to say beside it."""
    given = dict(cache_ratio=0.3, calibration_tokens=1024, keys="auto", work="latency")
    dry = convert(str(tiny("gpt2")), tmp_path / "out", dry_run=True, **given)
    assert dry.plan.keys == "joint" and dry.forms == {"self": {}}


def test_a_dry_run_says_what_each_form_costs(tiny, tmp_path):
    given = ["convert", tiny(), "--out", tmp_path / "out", "--dry-run", "--cache-ratio", "0.3"]
    lines = run(*given, "--calibration-tokens", "1024").output.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("--keys"))
    rows = [line.split() for line in lines[at + 1 : at + 5]]
    assert [row[0] for row in rows] == ["joint", "per-head", "commuting", "channels"]
    assert rows[0][1] == "*"  # that is planned
    found = json.loads(run(*given, "--calibration-tokens", "1024", "--json").output)["self"]
    for row in rows:
        cost = found["forms"][row[0]]
        size, work, kl = (column.replace(",", "") for column in row[-3:])
        assert int(size) == cost["kv_bytes_per_token"]
        assert int(work) * 2 == cost["kv_flops_per_token"]
        assert float(kl) == pytest.approx(cost["predicted_kl"], abs=1e-4)
    assert found["kv_bytes_per_token"] == found["forms"]["joint"]["kv_bytes_per_token"]


@pytest.mark.parametrize(
    "options, says",
    [
        (["--work", "latency"], "--work chooses among forms of keys"),
        (["--keys", "auto", "--work", "fast", "--cache-ratio", "0.3"], "'fast' is no limit"),
        (["--keys", "auto", "--work", "-1", "--cache-ratio", "0.3"], "'-1' is no limit"),
        (["--keys", "auto", "--work", "2", "--cache-ratio", "0.3"], "the least is channels, 4"),
        (["--keys", "auto"], "goes with codes only"),
        (["--keys", "auto", "--bits", "16", "--cache-ratio", "0.5"], "goes with codes only"),
        (["--keys", "auto", "--calibration", "none"], "goes with codes only"),
        (["--keys", "auto", "--bits", "8"], "--cache-ratio in place of --rank"),
    ],
    ids=str,
)
def test_work_that_cannot_be(options, says, source, tmp_path):
    refused(source, tmp_path / "out", *options, says=says)
