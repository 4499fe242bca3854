"""The sweep converts as `convert` does, at the same bytes for every method, and finds the knee."""

import csv
import itertools
import json

import pytest
import torch
from conftest import run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert import convert
from lrkv_convert.evaluate import compare
from lrkv_convert.examples.text import Text
from lrkv_convert.families import FAMILIES, Geometry, Site
from lrkv_convert.frontier import (
    DEFAULT,
    METHODS,
    Outcome,
    default_methods,
    knee,
    matching_plan,
    sweep,
)
from lrkv_convert.study import Study

CPU = torch.device("cpu")
TEXT = Text(
    "sample",
    "A frontier is drawn where two countries meet, and a knee where a curve gives up its hurry. "
    * 8,
)


def test_a_point_of_the_sweep_is_the_conversion_of_that_rank(tiny, converted, tmp_path):
    found = sweep(
        str(tiny()), [7], TEXT, methods=["lrkv"], calibration_tokens=1024, seq_len=64, device=CPU
    )
    result = compare([str(tiny()), str(converted())], [TEXT], seq_len=64, device=CPU)
    [point] = found["points"]
    assert point["ratio"] == pytest.approx(result["models"][1]["ratio"], rel=1e-5)
    assert point["kl"] == pytest.approx(result["models"][1]["kl"], rel=1e-3)
    assert point["cache_ratio"] == pytest.approx(result["models"][1]["kv_ratio"])


def test_every_rank_is_handed_over_when_it_is_measured(tiny):
    seen = []
    found = sweep(
        str(tiny()),
        [3, 7],
        TEXT,
        methods=["lrkv", "latent"],
        calibration_tokens=512,
        seq_len=64,
        device=CPU,
        each=seen.append,
    )
    assert [[p["rank"] for p in result["points"]] for result in seen] == [[3, 3], [3, 3, 7, 7]]
    assert seen[-1] == found


@pytest.mark.parametrize("bits", ["auto", "8,4"])
def test_codes_are_planned_in_the_bytes_of_a_16_bit_cache(tiny, tmp_path, bits):
    found = sweep(
        str(tiny()),
        [7],
        TEXT,
        methods=["codes", "budget", "lrkv"],
        bits=bits,
        calibration_tokens=1024,
        seq_len=64,
        device=CPU,
    )
    codes, budget, lrkv = found["points"]
    options = {"cache_ratio": lrkv["cache_ratio"], "dtype": "bfloat16", "calibration_tokens": 1024}
    planned = [
        convert(str(tiny()), tmp_path / "none", bits=b, dry_run=True, **options).plan.ratio
        for b in (bits, "16")
    ]
    assert [codes["cache_ratio"], budget["cache_ratio"]] == planned
    assert codes["kl"] < budget["kl"] / 2 and found["bits"] == bits


@pytest.mark.parametrize("method", METHODS)
def test_no_method_caches_more_than_lrkv_at_its_rank(method):
    g = Geometry(width=576, kv_heads=8, groups=1, head_dim=64, rotary_dim=64)
    sites = [Site(i, "self", "", FAMILIES["llama"].any, g) for i in range(2)]
    for rank in (0, 8, 24, 40):
        found, most = (matching_plan(name, rank, sites, 2) for name in (method, "lrkv"))
        assert found.ratio <= most.ratio


def test_the_knee_is_where_the_curve_bends():
    curve = [
        Outcome("lrkv", "fisher", 0, x, 1, y, 0)
        for x, y in ((0.3, 2.0), (0.4, 1.2), (0.5, 1.1), (0.6, 1.05), (0.7, 1.0))
    ]
    assert knee(curve) == 0.4
    assert knee(curve[:2]) is None


def test_sweep_from_the_command_line(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    done = CliRunner().invoke(
        app,
        [
            "sweep",
            str(tiny()),
            "--ranks",
            "3,7",
            "--methods",
            "codes,budget,lrkv,latent:whitened,pooled",
            "--text",
            str(tmp_path / "text.txt"),
            "--out",
            str(tmp_path / "out"),
            "--calibration-tokens",
            "1024",
            "--seq-len",
            "64",
        ],
    )
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert (
        "latent (whitened)" in done.stdout and max(map(len, done.stdout.splitlines()[:-1])) <= 100
    )
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    with open(tmp_path / "out" / "sweep.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(points) == len(rows) == 10 and float(rows[0]["ratio"]) == points[0]["ratio"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options, says",
    [
        (["--ranks", "a,b"], "not numbers"),
        (["--ranks", "99"], "out of range"),
        (["--methods", "magic"], "unknown method"),
        (["--methods", "codes:whitened"], "not in the whitened metric"),
        (["--bits", "16"], "codes have fewer bits"),
        (["--bits", "5"], "no width of codes"),
    ],
)
def test_sweep_refuses_in_one_line(tiny, tmp_path, options, says):
    (tmp_path / "text.txt").write_text(TEXT.content)
    done = CliRunner().invoke(
        app,
        [
            "sweep",
            str(tiny()),
            "--text",
            str(tmp_path / "text.txt"),
            "--out",
            str(tmp_path / "out"),
            *options,
        ],
    )
    assert done.exit_code == 1 and says in done.stderr and not (tmp_path / "out").exists()


def refusal(model, tmp_path, *options) -> str:
    (tmp_path / "text.txt").write_text(TEXT.content)
    places = ["--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--ranks", "5"]
    [line] = run("sweep", model, *places, *options, code=1).stderr.strip().splitlines()
    assert not (tmp_path / "out").exists()
    return line


def test_weights_that_are_not_finite_are_not_swept(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj.weight contains NaN or Inf" in refusal(source, tmp_path)


def test_a_metric_that_says_nothing_of_the_model_is_refused_as_in_a_conversion(tiny, tmp_path):
    assert "knows nothing of QK-norm" in refusal(
        tiny("qwen3"), tmp_path, "--methods", "budget,latent:attention"
    )


def test_what_a_decoder_does_not_read_is_refused(tiny, tmp_path):
    for option in ("--pairs", "--audio"):
        assert "has no encoder" in refusal(tiny(), tmp_path, option, tmp_path)


def test_what_was_found_in_the_source_is_said(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (tmp_path / "text.txt").write_text(TEXT.content)
    done = run(
        *("sweep", source, "--text", tmp_path / "text.txt", "--out", tmp_path / "out"),
        *("--ranks", 5, "--methods", "lrkv", "--calibration-tokens", 512, "--seq-len", 64),
    )
    assert "note: " in done.stderr and "lm_head" in done.stderr


def test_a_model_whose_cache_takes_no_codes_is_swept_without(tiny, tmp_path):
    """Keys of OLMo-2 are normalised over all heads, after their latents."""
    assert "codes" not in default_methods(Study(str(tiny("olmo2"))))
    assert "make no codes" in refusal(tiny("olmo2"), tmp_path, "--methods", "codes")
    assert default_methods(Study(str(tiny()))) == list(DEFAULT)


def test_labels_stand_clear_of_each_other_and_nearest_to_their_own_curve(tmp_path):
    pytest.importorskip("matplotlib")
    from lrkv_convert import plot

    figure, axes = plot.pyplot.subplots(figsize=(8, 6))
    curves = [[(x / 10, y * 10**-x) for x in range(1, 5)] for y in (1, 3, 9)]
    for curve in curves:
        axes.plot(*zip(*curve))
    axes.set_yscale("log")
    axes.set_xlim(0, 0.6)
    bits = [axes.annotate("int4", curve[0]) for curve in curves]
    figure.draw_without_rendering()
    plot.beside(
        axes, curves, names := ["first", "second curve", "a third, of many words"], ["k"] * 3, bits
    )
    labels = [text for text in axes.texts if text.get_text() in names]
    boxes = [text.get_window_extent() for text in (*labels, *bits)]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    traced = [plot._traced(axes.transData.transform(curve)) for curve in curves]
    for i, box in enumerate(boxes[:3]):
        far = [plot._distance(box, trace) for trace in traced]
        assert min(far) == far[i] < 60
    plot.pyplot.close(figure)


def test_a_frontier_of_bytes_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from lrkv_convert.plot import bytes_against_loss

    row = lambda method, setting, share, kl: {
        "method": method,
        "setting": setting,
        "share": share,
        "kl": kl,
    }
    record = {
        "model": "m",
        "tokens": 1000,
        "window": 512,
        "methods": {"codes": {"label": "ours"}, "fp8": {"label": "FP8"}},
        "rows": [
            row("codes", "a", 0.25, 0.01),
            row("codes", "b", 0.5, 0.0),  # exact: at the foot of a log scale
            row("fp8", "fp8", 0.5, 0.02),
        ],
    }
    bytes_against_loss(record, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
