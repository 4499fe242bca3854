"""What a folder means: for each that transformers loads the same logits at full rank, or a
refusal in one line; never other weights."""

import json
import random
import shutil

import pytest
import torch
from conftest import run
from folders import (
    CHANGES,
    EXTRAS,
    LEFTOVERS,
    PREFIXES,
    TIES,
    convert_fully,
    index,
    judged,
    make,
    save_legacy,
    save_safe,
    shards,
)
from safetensors.torch import load_file

ROUNDS = 36
LAYOUTS = ("safetensors", "sharded", "bin", "legacy", "sharded bin")


def drawn(round_: int) -> tuple[str, dict]:
    """A family, and ways to leave it: each usual one half of the time."""
    draw = random.Random(round_)
    some = lambda choices: (
        draw.choice(list(choices)) if draw.random() < 0.5 else next(iter(choices))
    )
    return ("llama", "gpt2", "qwen2")[round_ % 3], dict(
        layout=LAYOUTS[round_ % 5],
        leftover=draw.choice(list(LEFTOVERS)),
        prefix=some(PREFIXES),
        tie=draw.choice(TIES),
        extra=some(EXTRAS),
        change=some(CHANGES),
    )


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_any_folder_gives_the_same_logits_or_a_line(round_, tiny, tmp_path):
    family, ways = drawn(round_)
    outcome = judged(make(tiny(family), tmp_path / "in", family, **ways), tmp_path / "out")
    harmless = (
        ways["prefix"] in ("none", "bare")
        and ways["extra"] in ("none", "a head", "tables", "a layer more", "positions")
        and not ways["change"].startswith("one")
        and ways["tie"] != "untied, no head"
    )
    assert outcome == "same" or not harmless, ways


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        dict(layout=layout, leftover=leftover)
        for layout in LAYOUTS
        for leftover in LEFTOVERS
        if leftover != "none"
    ],
    ids=lambda ways: "-".join(ways.values()),
)
def test_files_that_transformers_does_not_read_change_nothing(ways, tiny, tmp_path):
    assert judged(make(tiny("gpt2"), tmp_path / "in", "gpt2", **ways), tmp_path / "out") == "same"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tie", TIES)
def test_weights_are_tied_as_transformers_ties_them(family, tie, tiny, tmp_path):
    outcome = judged(make(tiny(family), tmp_path / "in", family, tie=tie), tmp_path / "out")
    assert outcome == ("refused" if tie == "untied, no head" else "same")


@pytest.mark.parametrize(
    "extra, says", [("a bias", "o_proj.bias"), ("an adapter", "merge"), ("a norm", "q_norm.weight")]
)
def test_tensors_that_would_change_the_model_are_refused(extra, says, tiny, tmp_path):
    for prefix in ("none", "bare"):
        assert (
            says
            in convert_fully(
                make(tiny(), tmp_path / prefix, "llama", extra=extra, prefix=prefix),
                tmp_path / "out",
            ).stderr
        )


def test_tensors_without_a_place_are_named_once(tiny, tmp_path):
    result = convert_fully(make(tiny(), tmp_path / "in", "llama", extra="a head"), tmp_path / "out")
    assert [line for line in result.stderr.splitlines() if "no place" in line] == [
        "note: the checkpoint holds v_head.summary.weight, for which the model has no place: left "
        "out, as transformers does"
    ]
    assert "v_head" in json.loads((tmp_path / "out" / "lrkv.json").read_text())["notices"][0]
    assert not convert_fully(
        make(tiny("gpt2"), tmp_path / "tables", "gpt2", extra="tables"), tmp_path / "out2"
    ).stderr


@pytest.mark.parametrize(
    "prefix, whose",
    [("module.", "DDP"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT")],
)
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_wrappers_are_told_by_name(prefix, whose, layout, tiny, tmp_path):
    result = convert_fully(
        make(tiny(), tmp_path / "in", "llama", prefix=prefix, layout=layout), tmp_path / "out"
    )
    assert result.exit_code and whose in result.stderr


def test_a_wrapper_inside_of_the_names_is_told_too(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    save_safe(
        {name.replace("self_attn.", "self_attn._orig_mod."): t for name, t in tensors.items()},
        source / "model.safetensors",
    )
    assert "torch.compile" in convert_fully(source, tmp_path / "out").stderr


def test_one_tensor_under_two_names_counts_once_or_not_at_all(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    save_safe(
        tensors | {"norm.weight": tensors["model.norm.weight"].clone()},
        source / "model.safetensors",
    )
    assert judged(source, tmp_path / "out") == "same"
    save_safe(
        tensors | {"norm.weight": tensors["model.norm.weight"] + 1}, source / "model.safetensors"
    )
    assert "twice" in convert_fully(source, tmp_path / "out2").stderr


@pytest.mark.parametrize("value", ["a text", None, 7, ["a"], {"a": "b"}])
def test_pickles_hold_names_and_tensors(value, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for i, saved in enumerate(
        (tensors | {"note": value}, {7: tensors["model.norm.weight"]}, value)
    ):
        torch.save(saved, source / "pytorch_model.bin")
        assert "pytorch_model.bin" in convert_fully(source, tmp_path / f"out{i}").stderr


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_a_trainers_checkpoint_is_told(key, save, source, tmp_path):
    save(
        {key: load_file(source / "model.safetensors"), "epoch": 3, "optimizer": {"state": {}}},
        source / "pytorch_model.bin",
    )
    (source / "model.safetensors").unlink()
    assert f"stand inside it under '{key}'" in convert_fully(source, tmp_path / "out").stderr


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{",
        '{"metadata": {}}',
        '{"metadata": {}, "weight_map": null}',
        '{"metadata": {}, "weight_map": "a"}',
        '{"metadata": {}, "weight_map": ["a"]}',
        '{"metadata": {}, "weight_map": {}}',
        *(
            json.dumps({"metadata": {}, "weight_map": {"a": value}})
            for value in (None, 7, ["a"], "x" * 5000, "../in2/model.safetensors", "/etc/passwd", "")
        ),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_of_the_wrong_kind(file, content, source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / file).write_text(content)
    assert convert_fully(source, tmp_path / "out").exit_code


def test_shards_in_a_folder_of_their_own_are_read(source, tmp_path):
    (source / "parts").mkdir()
    placed = shards(
        source / "parts",
        load_file(source / "model.safetensors"),
        2,
        "model",
        "safetensors",
        save_safe,
    )
    (source / "model.safetensors").unlink()
    index(
        source,
        "model.safetensors.index.json",
        {name: f"parts/{file}" for name, file in placed.items()},
    )
    assert judged(source, tmp_path / "out") == "same"


def test_the_config_may_name_the_file(source, tmp_path):
    (source / "model.safetensors").rename(source / "mine.safetensors")
    config = json.loads((source / "config.json").read_text())
    for named, outcome in (
        ("mine.safetensors", "same"),
        ("../mine.safetensors", "refused"),
        ("other.safetensors", "refused"),
        (7, "refused"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
        assert judged(source, tmp_path / f"out-{outcome}-{len(str(named))}") == outcome


@pytest.mark.parametrize(
    "file, says",
    [
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("consolidated.00.pth", "their maker"),
        ("pytorch_model_fsdp.bin", "not under a name"),
        ("model.fp16.safetensors", "not under a name"),
    ],
)
def test_weights_that_transformers_does_not_read_are_refused_by_name(file, says, source, tmp_path):
    (source / "model.safetensors").rename(source / file)
    line = convert_fully(source, tmp_path / "out").stderr
    assert file in line and says in line


def test_an_adapter_alone_says_what_it_is(source, tmp_path):
    (source / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    )
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    for remove in (None, "config.json"):
        if remove:
            (source / remove).unlink()
        line = convert_fully(source, tmp_path / "out").stderr
        assert "PEFT adapter of some/base" in line and "merge_and_unload" in line
    assert "PEFT adapter of some/base" in run("eval", source, code=1).stderr


def test_an_adapter_beside_the_weights_is_noted_where_transformers_leaves_it_out(
    source, tmp_path, monkeypatch
):
    (source / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    )
    monkeypatch.setattr("lrkv_convert.source.files.is_peft_available", lambda: False)
    assert "note: " in convert_fully(source, tmp_path / "out").stderr
    monkeypatch.setattr("lrkv_convert.source.files.is_peft_available", lambda: True)
    assert "transformers applies it" in convert_fully(source, tmp_path / "out2").stderr


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("place", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_types_that_are_no_weights(dtype, place, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors[place] = tensors[place].to(dtype)
    save = torch.save if dtype.is_complex else save_safe
    save(tensors, source / ("pytorch_model.bin" if dtype.is_complex else "model.safetensors"))
    if dtype.is_complex:
        (source / "model.safetensors").unlink()
    line = convert_fully(source, tmp_path / "out").stderr
    assert place in line and ("no type of weights" in line)
    assert (
        place in run("convert", source, "--out", tmp_path / "out", "--rank", 7, code=1).stderr
    )  # --dtype auto


@pytest.mark.parametrize(
    "old, new", [("BF16", "I16 "), ("BF16", "U16 "), ("BF16", "FOUR"), ("BF16", "F16 ")]
)
def test_a_header_that_lies_about_its_types(old, new, tiny, tmp_path):
    folder = make(tiny(), tmp_path / "in", "llama", change="bfloat16")
    data = (folder / "model.safetensors").read_bytes()
    quoted = f'"{new.strip()}"' + " " * (4 - len(new.strip()))
    (folder / "model.safetensors").write_bytes(
        data.replace(f'"{old}"'.encode(), quoted.encode(), 1)
    )
    judged(folder, tmp_path / "out")


def test_weights_that_do_not_fit_the_output_are_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ):
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[name].view(-1)[5] = 1e30
        save_safe(changed, source / "model.safetensors")
        line = run(
            "convert",
            source,
            "--out",
            tmp_path / "out",
            "--rank",
            7,
            "--calibration",
            "none",
            "--dtype",
            "float16",
            code=1,
        ).stderr
        assert name in line and "float16" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        *(
            pytest.param(f"model.layers.1.{name}_proj.weight", marks=pytest.mark.slow)
            for name in ("mlp.up", "self_attn.k")
        ),
    ],
)
def test_huge_weights_are_one_line(name, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors[name].fill_(3e38)
    save_safe(tensors, source / "model.safetensors")
    result = run(
        "convert",
        source,
        "--out",
        tmp_path / "out",
        "--rank",
        7,
        "--calibration-tokens",
        1024,
        code=1,
    )
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, part",
    [("mixtral", "block_sparse_moe.experts.2.w1"), ("qwen2_moe", "mlp.experts.3.down_proj")],
)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to(torch.int8),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t[:-1].contiguous(),
        lambda t: t.half(),
        lambda t: t.flatten(),
    ],
)
def test_every_expert_is_looked_at(family, part, change, tiny, tmp_path):
    folder = shutil.copytree(tiny(family), tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    [name] = [name for name in tensors if f"layers.1.{part}" in name]
    tensors[name] = change(tensors[name])
    save_safe(tensors, folder / "model.safetensors")
    assert judged(folder, tmp_path / "out") == (
        "same" if tensors[name].dtype == torch.float16 else "refused"
    )


@pytest.mark.parametrize(
    "family, old, new",
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.gate.weight",
            "model.layers.1.mlp.gate.weight",
        ),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.0.w2.weight",
            "model.layers.0.mlp.experts.down_proj",
        ),
    ],
)
def test_a_tensor_under_its_old_and_its_new_name(family, old, new, tiny, tmp_path):
    folder = shutil.copytree(tiny(family), tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    held = tensors.get(old, tensors.get(new))
    tensors[old] = held
    tensors[new] = held[None].repeat(4, 1, 1) + 1 if "experts" in new else held + 1
    save_safe(tensors, folder / "model.safetensors")
    assert "twice" in convert_fully(folder, tmp_path / "out").stderr
