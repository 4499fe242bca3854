"""Bad input: one line with a hint, a non-zero exit, nothing left behind."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert import LrkvError, convert

runner = CliRunner()


def edit(source: Path, change) -> Path:
    """Apply `change` to the tensors of a copied model folder."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "out", says="no such model")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", says="empty folder")


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("hello")
    refused(tmp_path / "notes", tmp_path / "out", says="no config.json")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", tmp_path / "out", says="is a file")


def test_a_broken_config(source, tmp_path):
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "out", says="cannot read the config")


def test_no_weights(source, tmp_path):
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", says="no weights")


def test_an_unreachable_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("someone/some-model", tmp_path / "out", says="nor can it be fetched from the hub")


def test_a_broken_gguf(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    refused(tmp_path / "bad.gguf", tmp_path / "out", says="bad.gguf")


def test_an_unsupported_family_names_the_nearest(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "granite"}))
    line = refused(source, tmp_path / "out", says="'granite' is not supported")
    assert "nearest supported: " in line and "gpt2, gpt_neo, gpt_neox, gptj, llama" in line


def test_a_single_kv_head(tmp_path):
    LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "num_key_value_heads": 1}).save_pretrained(
        tmp_path / "mqa"
    )
    (tmp_path / "mqa" / "model.safetensors").touch()
    save_file({"x": torch.zeros(1)}, tmp_path / "mqa" / "model.safetensors")
    refused(tmp_path / "mqa", tmp_path / "out", says="one KV head")


def test_an_already_converted_model(converted, tmp_path):
    refused(converted(), tmp_path / "out", says="already an LRKV model")


@pytest.mark.parametrize(
    "rank, says", [("-1", "out of range"), ("21", "out of range"), ("14", "of the original cache")]
)
def test_ranks_out_of_range(source, tmp_path, rank, says):
    line = refused(source, tmp_path / "out", "--rank", rank, says=says)
    assert "up to 13" in line


def test_truncated_safetensors(source, tmp_path):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(source, tmp_path / "out", says="truncated or corrupt")


def test_corrupt_safetensors(source, tmp_path):
    (source / "model.safetensors").write_bytes(os.urandom(4096))
    refused(source, tmp_path / "out", says="truncated or corrupt")


def test_a_missing_shard(source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="40KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    refused(source, tmp_path / "out", says=gone.name)


def test_a_missing_tensor(source, tmp_path):
    edit(source, lambda t: t.pop("model.layers.1.self_attn.v_proj.weight"))
    refused(
        source, tmp_path / "out", says="lacks the tensor model.layers.1.self_attn.v_proj.weight"
    )


def test_a_wrong_shape(source, tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(source, lambda t: t.update({name: t[name][:40].clone()}))
    assert "(40, 48)" in refused(source, tmp_path / "out", says=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(source, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(source, lambda t: t[name].view(-1).__setitem__(3, value))
    refused(source, tmp_path / "out", says=f"{name} contains NaN or Inf")


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm_was_done"),))


def test_pickles_that_run_code(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"x": Harm()}, source / "pytorch_model.bin")
    refused(source, tmp_path / "out", says="weights_only")
    assert not Path("harm_was_done").exists()


def test_quantised_weights(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(source, tmp_path / "out", says="quantised weights")


def test_an_output_that_exists(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(source, tmp_path / "out", says="exists")
    refused(source, tmp_path / "out", "--overwrite", says="something other than a converted model")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_is_a_file(source, tmp_path):
    (tmp_path / "out").write_text("x")
    refused(source, tmp_path / "out", "--overwrite", says="is a file")


def test_output_equals_input(source, tmp_path):
    refused(source, source, "--overwrite", says="is the input")
    refused(source, tmp_path, "--overwrite", says="is the input, or holds it")
    assert (source / "model.safetensors").is_file()


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\x00broken"])
def test_unusable_calibration_text(source, tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    refused(source, tmp_path / "out", "--calibration", str(tmp_path / "text.txt"), says="text")


def test_json_is_no_text(source, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}')
    refused(
        source,
        tmp_path / "out",
        "--calibration",
        str(tmp_path / "pairs.jsonl"),
        says="is JSON, not text",
    )


def test_a_missing_calibration_text(source, tmp_path):
    refused(
        source,
        tmp_path / "out",
        "--calibration",
        str(tmp_path / "nowhere.txt"),
        says="cannot read the text",
    )


def test_a_model_without_tokenizer(source, tmp_path):
    for file in source.glob("tokenizer*"):
        file.unlink()
    refused(source, tmp_path / "out", says="no tokenizer that loads")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--cache-ratio", "1.2"], "out of range"),
        (["--cache-ratio", "0.01"], "floor of this model"),
        (["--cache-ratio", "0.5", "--rank", "3"], "exclude each other"),
        (["--cache-ratio", "0.5", "--base", "mean"], "plans the joint base only"),
        (["--base-width", "61"], "out of range"),
        (["--cache-ratio", "0.5", "--calibration", "none"], "on calibration text"),
        (["--cache-ratio", "0.5", "--metric", "plain"], "gradient of the loss"),
        (["--max-width-k", "20"], "a limit of --cache-ratio"),
        (["--cache-ratio", "0.5", "--max-width-v", "0"], "at least 1 wide"),
        (["--metric", "whitened", "--calibration", "none"], "made of calibration text"),
        (["--calibration-tokens", "0"], "tokens are none"),
        (["--base", "mean", "--base-width", "12"], "as wide as a head"),
        (["--base", "pooled", "--base-width", "20"], "rank 0"),
        (["--metric", "taste"], "unknown metric"),
    ],
)
def test_budgets_and_widths_out_of_range(source, tmp_path, options, says):
    refused(source, tmp_path / "out", *options, says=says)


@pytest.mark.parametrize(
    "option, value",
    [("--base", "median"), ("--dtype", "int8"), ("--device", "abacus"), ("--recipe", "nothing")],
)
def test_unknown_choices(source, tmp_path, option, value):
    refused(source, tmp_path / "out", option, value, says=value)


def test_a_recipe_with_a_misspelt_field(source, tmp_path):
    (tmp_path / "r.yaml").write_text("rnak: 7\n")
    refused(source, tmp_path / "out", "--recipe", str(tmp_path / "r.yaml"), says="rnak")


def test_folders_made_for_the_output_go_again(source, tmp_path):
    def full(stage: str, *_) -> None:
        if stage == "converting":
            raise OSError(28, "No space left on device")

    with pytest.raises(LrkvError, match="No space left"):
        convert(
            str(source), tmp_path / "new" / "deep" / "out", progress=full, rank=7, calibration=[]
        )
    assert not (tmp_path / "new").exists()


def test_an_unwritable_place(source, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(source, tmp_path / "file" / "out", says="cannot write")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["{tiny}", "/nowhere"], "no such model"),
        (["/nowhere"], "no such model"),
        (["{tiny}", "{empty}"], "no config.json"),
        (["{tiny}", "--seq-len", "2000"], "longer than"),
        (["{tiny}", "--device", "abacus"], "abacus"),
        (["{tiny}", "--dtype", "int3"], "int3"),
    ],
)
def test_compare_refuses_in_one_line(arguments, says, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("some text to measure on, long enough for a window or two")
    filled = [a.format(tiny=tiny(), empty=tmp_path / "empty") for a in arguments]
    command = "compare" if len(filled) > 1 and not filled[1].startswith("--") else "eval"
    result = runner.invoke(app, [command, *filled, "--text", str(tmp_path / "text.txt")])
    assert (
        result.exit_code == 1
        and says in result.stderr
        and len(result.stderr.strip().splitlines()) == 1
    ), result.stderr


def test_compare_refuses_incomplete_weights(converted, tmp_path):
    broken = shutil.copytree(converted(), tmp_path / "broken")
    edit(broken, lambda t: t.pop("model.layers.0.self_attn.keys.U.weight"))
    (tmp_path / "text.txt").write_text("some text to measure on")
    result = runner.invoke(app, ["eval", str(broken), "--text", str(tmp_path / "text.txt")])
    assert result.exit_code == 1 and "keys.U.weight" in result.stderr


def test_compare_refuses_an_empty_text(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("")
    result = runner.invoke(app, ["eval", str(tiny()), "--text", str(tmp_path / "text.txt")])
    assert result.exit_code == 1 and "empty or too short" in result.stderr


@pytest.mark.parametrize(
    "options, says",
    [
        (["--keys", "some"], "unknown form of keys"),
        (["--keys", "rotary", "--base", "aligned"], "joint base only"),
        (["--keys", "per-head", "--base-width-k", "20"], "how wide keys are"),
        (["--keys", "full", "--rank-k", "3"], "how wide keys are"),
        (["--keys", "commuting", "--base", "aligned"], "joint base only"),
        (["--keys", "commuting", "--rank-k", "3"], "has no residuals"),
        (["--keys", "commuting", "--base-width-k", "21"], "21 is odd"),
        (["--keys", "commuting", "--base-width-k", "62"], "out of range"),
        (["--keys", "full", "--cache-ratio", "0.4"], "below the smallest plan"),
        (["--keys", "rotary", "--cache-ratio", "0.5", "--max-width-k", "20"], "how wide keys are"),
        (["--max-shard-size", "5G"], "shard size"),
    ],
)
def test_forms_of_keys_that_do_not_fit(source, tmp_path, options, says):
    refused(source, tmp_path / "out", *options, says=says)


def test_rotary_keys_need_rope_that_stays(tiny, tmp_path):
    from lrkv_convert import LrkvError, convert

    for keys in ("rotary", "commuting"):
        with pytest.raises(LrkvError, match="needs RoPE"):
            convert(str(tiny("gpt2")), tmp_path / "out", keys=keys, rank=7)
    copy = tmp_path / "model"
    shutil.copytree(tiny(), copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(LrkvError, match="dynamic RoPE"):
        convert(str(copy), tmp_path / "out", keys="rotary", rank=7)


def test_a_base_width_alone_asks_for_a_rank(tiny, tmp_path):
    from lrkv_convert import LrkvError, convert

    with pytest.raises(LrkvError, match="needs a rank"):
        convert(str(tiny()), tmp_path / "out", base_width=33)
