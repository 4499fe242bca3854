"""What `lrkv bench` reports: the caches it says it fills, the bytes it says are read, in every
combination it offers.
"""

import json
from collections import Counter

import pytest
import torch
from conftest import prompt, uneven
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert import LrkvError
from lrkv_convert.evaluate.bench import (
    Contender,
    bench,
    filled_cache,
    longest_context,
    read_bytes,
    working_bytes,
)
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.evaluate.step import (
    Shape,
    attention_step,
    eager_attention,
    full_attention,
    product_attention,
)
from lrkv_convert.modeling.contract_lrkv import CACHE

CPU = torch.device("cpu")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_filled_caches_hold_what_they_say_and_decode(family, kind, tiny, converted):
    for model in (load(tiny(family)), load(converted(family)), uneven(family)):
        cache = filled_cache(model, kind, batch=2, tokens=50, room=6)
        sliding = [layer for layer in cache.layers if layer.is_sliding]
        kept = [layer for layer in cache.layers if layer.keys is not None]
        assert all(int(layer.get_seq_length()) == 50 for layer in kept)
        if not sliding:
            assert cache_bytes(cache) == 2 * (56 if kind == "static" else 50) * formula_bytes(
                model.config, 4
            )
        with torch.no_grad():
            out = model(prompt(1, batch=2), past_key_values=cache)
        assert torch.isfinite(out.logits).all() and all(
            int(layer.get_seq_length()) == 51 for layer in kept
        )


def test_rows_are_consistent(tiny, converted):
    result = bench(
        [str(tiny()), str(converted())],
        tokens=[40, 80],
        batches=[1, 3],
        routes=["auto", "rebuild"],
        steps=2,
        device=CPU,
    )
    rows = result["rows"]
    assert Counter((r["model"], r["path"]) for r in rows) == {
        ("model", "original"): 4,
        ("model", "auto: split"): 4,
        ("model", "rebuild"): 4,
    }
    for first, *others in zip(*[iter(rows)] * 3):
        assert first["speedup"] == 1 and first["path"] == "original"
        for r in others:
            assert r["speedup"] == pytest.approx(first["milliseconds"] / r["milliseconds"])
            assert r["cache_bytes"] < first["cache_bytes"]
        for r in (first, *others):
            assert r["tokens_per_second"] == pytest.approx(r["batch"] * 1e3 / r["milliseconds"])
            assert r["of_limit"] == pytest.approx(r["limit_milliseconds"] / r["milliseconds"])
            assert r["limit_milliseconds"] == pytest.approx(
                1e3 * r["bytes_read"] / result["copy_bytes_per_second"]
            )
    assert json.loads(json.dumps(result)) == result


def test_an_embedding_of_its_own_is_not_read(tiny):
    untied, tied = load(tiny("llama")), load(tiny("llama-bias"))
    count = lambda model: sum(p.numel() * 4 for p in model.parameters())
    assert read_bytes(untied) == count(untied) - 260 * 48 * 4
    assert read_bytes(tied) == count(tied)


def test_working_memory_is_seen():
    """Ten times 40 MB held at once, after as much was held and freed before."""
    if working_bytes(lambda: None, CPU) is None:
        pytest.skip("this system does not tell")
    take = lambda n: [torch.ones(10_000_000) for _ in range(n)]
    take(12)
    assert 380e6 < working_bytes(lambda: take(10), CPU) < 450e6
    assert working_bytes(lambda: take(1), CPU) < 100e6


def test_the_longest_context_is_found(converted):
    """Against a device that holds 1,900 tokens and no more."""
    model = load(converted())

    def allocate(module, args, given):
        if given[CACHE].get_seq_length() * len(given["input_ids"]) > 1900:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    contender = Contender("x", model, "auto")
    model.config.max_position_embeddings = 100_000
    assert 1900 - 16 < longest_context(contender, "static", 1, start=64, precision=16) <= 1900
    assert 950 - 16 < longest_context(contender, "static", 2, start=64, precision=16) <= 950
    assert 1900 - 256 < longest_context(contender, "static", 1, start=4096) <= 1900
    assert longest_context(contender, "static", 200, start=64, precision=16) == 0
    model.config.max_position_embeddings = 640
    assert 640 - 20 < longest_context(contender, "static", 1, start=64, precision=16) <= 640


@pytest.mark.parametrize("rotary", [False, True])
def test_an_attention_step_counts_the_bytes_of_the_formula(rotary):
    shape = Shape(4, 2, 32, (32, 8), (48, 4), rotary=rotary)
    full, eager, first, split, rebuild = attention_step(
        shape, 2, 64, CPU, torch.float32, rounds=1, copy_rate=1e9
    )
    assert [row["path"] for row in (full, eager, first, split, rebuild)] == [
        "full cache",
        "full, eager",
        "full, tokens first",
        "split",
        "rebuild",
    ]
    assert full["bytes"] == 2 * 64 * 4 * 2 * 4 * 32 and split["bytes"] == 2 * 64 * 4 * (
        32 + 4 * 8 + 48 + 4 * 4
    )
    assert eager["bytes"] == first["bytes"] == full["bytes"]
    assert split["cache_ratio"] == pytest.approx(split["bytes"] / full["bytes"])


def test_the_baselines_compute_attention():
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(
        full_attention(query, key, value), expected, atol=1e-6
    ) and torch.allclose(eager_attention(query, key, value), expected, atol=1e-6)
    assert torch.allclose(product_attention(query, key, value), expected, atol=1e-6)


# -------------------------------------------------------------------------------------- the command

runner = CliRunner()


def run(*args):
    return runner.invoke(app, ["bench", *map(str, args)])


def test_the_command_prints_a_table_writes_json_and_draws(tiny, converted, tmp_path):
    out = run(
        tiny(),
        converted(),
        "--tokens",
        "40,80",
        "--batch",
        "1,2",
        "--paths",
        "split",
        "--steps",
        "1",
        "--json",
        tmp_path / "b.json",
        "--png",
        tmp_path / "b.png",
    )
    assert out.exit_code == 0, out.output
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 8 and out.stdout.count("split") == 4
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    "options, said",
    [
        (["--tokens", "many"], "not numbers"),
        (["--tokens", "0"], "too small"),
        (["--paths", "fast"], "unknown"),
        (["--cache", "paged"], "unknown"),
        (["--tokens", "700"], "at most"),
        (["--tokens", "64", "--batch", "1000000000"], "no memory"),
        (["--longest"], "GPU"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_in_one_line(options, said, converted):
    done = run(converted(), *(options if "--tokens" in options else ["--tokens", "40", *options]))
    assert (
        done.exit_code == 1 and said in done.output and len(done.output.strip().splitlines()) == 1
    ), done.output


def test_the_kernel_path_is_refused_where_it_cannot_run(converted, monkeypatch):
    from lrkv_convert.modeling import kernel_lrkv

    monkeypatch.setattr(kernel_lrkv, "INTERPRETED", False)
    with pytest.raises(LrkvError, match="kernel path cannot run"):
        bench([str(converted())], tokens=[40], routes=["kernel"], device=CPU)
