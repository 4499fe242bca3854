"""GGUF files: RoPE is scaled as llama.cpp scales it, which transformers' reader leaves out;
damaged files are refused in one line."""

import math
import struct
from types import MappingProxyType

import pytest
import torch
from conftest import CONFIGS, prompt, relative, run
from folders import convert_fully
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lrkv_convert import LrkvError
from lrkv_convert.evaluate.load import load_model
from lrkv_convert.study import Study

gguf = pytest.importorskip("gguf")
from gguf_fixture import write_gguf  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_of(
    rope: dict | None = None, theta: float = 10000.0, head_dim: int = 8, **more
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    values = config.to_dict() | {
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(rope or {})},
        **more,
    }
    return LlamaForCausalLM(type(config)(**values)).eval()


def plain(model) -> torch.Tensor:
    d = model.config.head_dim
    return model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2).double() / d)


def divisors(model) -> torch.Tensor:
    """What llama.cpp's converter writes into rope_freqs.weight for llama3's scaling."""
    return (plain(model) / model.model.rotary_emb.inv_freq.double()).float()


def written(model, path, keys=lambda writer: None, tensors=MappingProxyType({})):
    write_gguf(gguf, model, path, keys, tensors)
    return path


def same(model, file, out) -> None:
    """Converted at full rank, and loaded to be compared with, the file gives the logits of
    `model`."""
    result = convert_fully(file, out, rank=min(20, model.config.head_dim))
    assert result.exit_code == 0, result.stderr
    ids = prompt(300)
    with torch.no_grad():
        wanted = model(ids).logits
        for found in (
            AutoModelForCausalLM.from_pretrained(out),
            load_model(str(file), torch.device("cpu"), torch.float32),
        ):
            assert relative(found(ids).logits, wanted) < 1e-4, found.config.rope_parameters


@pytest.mark.slow
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        LLAMA3
        | {
            "factor": 5.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 7.0,
            "original_max_position_embeddings": 300,
        },
        LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 60},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_llama3_scaling_stands_in_a_tensor(rope, theta, head_dim, tmp_path):
    model = model_of(rope, theta, head_dim)
    same(
        model,
        written(model, tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors(model)}),
        tmp_path / "out",
    )
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    if head_dim == 64 and rope["original_max_position_embeddings"] == 8192:
        assert config.rope_parameters == {"rope_theta": theta, **rope}


def test_divisors_of_no_known_kind_are_exact_too(tmp_path):
    factors = [1.0, 1.5, 1.2, 3.0]
    model = model_of(
        {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": 640,
        }
    )
    same(
        model,
        written(model, tmp_path / "a.gguf", tensors={"rope_freqs.weight": torch.tensor(factors)}),
        tmp_path / "out",
    )


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_linear_scaling(named, tmp_path):
    model = model_of({"rope_type": "linear", "factor": 4.0})
    keys = lambda writer: (
        named and writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        writer.add_rope_scaling_factor(4.0),
    )
    same(model, written(model, tmp_path / "a.gguf", keys), tmp_path / "out")
    model = model_of({"rope_type": "linear", "factor": 3.0})  # as very old files say it
    same(
        model,
        written(
            model,
            tmp_path / "b.gguf",
            lambda writer: writer.add_float32("llama.rope.scale_linear", 3.0),
        ),
        tmp_path / "out2",
    )
    model = model_of({"rope_type": "linear", "factor": 6.0})  # both: they multiply
    same(
        model,
        written(
            model,
            tmp_path / "c.gguf",
            lambda writer: writer.add_rope_scaling_factor(3.0),
            {"rope_freqs.weight": torch.full((4,), 2.0)},
        ),
        tmp_path / "out3",
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 0.7 * (0.1 * math.log(4) + 1)},
    ],
    ids=str,
)
def test_yarn(more, tmp_path):
    model = model_of(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160, **more},
        head_dim=64,
    )

    def keys(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(160)
        for name in ("beta_fast", "beta_slow"):
            if name in more:
                writer.add_float32(f"llama.rope.scaling.yarn_{name}", more[name])
        if "attention_factor" in more:
            writer.add_rope_scaling_attn_factors(0.7)

    same(model, written(model, tmp_path / "a.gguf", keys), tmp_path / "out")


def test_scaling_that_is_none_changes_nothing(tmp_path):
    model = model_of()
    same(
        model,
        written(
            model,
            tmp_path / "a.gguf",
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
                writer.add_rope_scaling_factor(4.0),
            ),
        ),
        tmp_path / "out",
    )
    same(
        model,
        written(model, tmp_path / "b.gguf", tensors={"rope_freqs.weight": torch.ones(4)}),
        tmp_path / "out2",
    )


def test_longrope_stands_in_two_tensors(tmp_path):
    short, long = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0]
    model = model_of(
        {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "factor": 4.0,
            "attention_factor": 1.2,
            "original_max_position_embeddings": 160,
        }
    )
    tensors = {
        "rope_factors_short.weight": torch.tensor(short),
        "rope_factors_long.weight": torch.tensor(long),
    }
    keys = lambda writer: (
        writer.add_rope_scaling_orig_ctx_len(160),
        writer.add_rope_scaling_attn_factors(1.2),
    )
    same(model, written(model, tmp_path / "a.gguf", keys, tensors), tmp_path / "out")


@pytest.mark.parametrize(
    "keys, tensors",
    [
        (lambda w: w.add_float32("llama.rope.scaling.alpha", 2.0), {}),
        (lambda w: w.add_string("llama.rope.scaling.type", "yoda"), {}),
        (lambda w: w.add_float32("llama.rope.scaling.factor", -2.0), {}),
        (lambda w: w.add_string("llama.rope.scaling.factor", "two"), {}),
        (lambda w: w.add_rope_scaling_yarn_log_mul(0.1), {}),
        (lambda w: w.add_rope_scaling_attn_factors(2.0), {}),
        (lambda w: None, {"rope_freqs.weight": torch.ones(3)}),
        (lambda w: None, {"rope_freqs.weight": torch.tensor([1.0, 0.0, 1.0, 1.0])}),
        (lambda w: None, {"rope_factors_long.weight": torch.ones(4)}),
        (lambda w: None, {"rope_freqs.weight": torch.ones(4, dtype=torch.float16)}),
        (
            lambda w: (
                w.add_string("llama.rope.scaling.type", "yarn"),
                w.add_float32("llama.rope.scaling.factor", 2.0),
            ),
            {"rope_freqs.weight": torch.ones(4)},
        ),
    ],
)
def test_scaling_that_cannot_be_exact_is_refused(keys, tensors, tmp_path):
    file = written(model_of(), tmp_path / "a.gguf", keys, tensors)
    assert "scaling of RoPE" in convert_fully(file, tmp_path / "out").stderr
    with pytest.raises(LrkvError, match="scaling of RoPE"):
        load_model(str(file), torch.device("cpu"))


def test_calibration_sees_the_scaled_rotation(tmp_path):
    model = model_of(LLAMA3, 500000.0, 64)
    study = Study(
        str(written(model, tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors(model)}))
    )
    skeleton = study.build(torch.device("cpu"))
    assert torch.allclose(
        skeleton.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5
    )


def test_a_cut_file_is_one_line_wherever_it_is_cut(tmp_path):
    data = written(model_of(), tmp_path / "a.gguf").read_bytes()
    for length in (0, 3, 4, 5, 8, 20, 24, 30, 200, 2000, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        assert "cut.gguf" in convert_fully(tmp_path / "cut.gguf", tmp_path / "out").stderr, length
    assert (
        "cut.gguf"
        in run("eval", tmp_path / "cut.gguf", "--max-tokens", 10, "--text", __file__, code=1).stderr
    )


@pytest.mark.parametrize(
    "at, count",
    [
        (8, 2**40),
        (8, 2**63),
        (16, 2**40),
        (16, 2**64 - 1),
        (24, 2**50),
        (24, 2**64 - 1),
        (8, 0),
        (8, 3),
        (16, 0),
        (4, 2**40),
    ],
)
def test_lying_counts_are_one_line(at, count, tmp_path):
    """Counts of tensors and keys, the length of the first name, the version."""
    data = bytearray(written(model_of(), tmp_path / "a.gguf").read_bytes())
    data[at : at + 8] = struct.pack("<Q", count)
    (tmp_path / "lies.gguf").write_bytes(data)
    assert convert_fully(tmp_path / "lies.gguf", tmp_path / "out").exit_code


@pytest.mark.parametrize(
    "key, value",
    [
        ("embedding_length", 2**31),
        ("block_count", 10**6),
        ("block_count", 1),
        ("feed_forward_length", 2**31),
        ("attention.head_count", 0),
    ],
)
def test_lying_sizes_are_one_line(key, value, tmp_path):
    file = tmp_path / "a.gguf"
    data = bytearray(written(model_of(), file).read_bytes())
    at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    data[at : at + 4] = struct.pack("<I", value)
    file.write_bytes(data)
    assert convert_fully(file, tmp_path / "out").exit_code


def test_a_missing_tensor_is_not_made_up_and_none_is_left_out(tmp_path):
    model = model_of()
    write_gguf(gguf, model, tmp_path / "a.gguf", left_out=("blk.1.ffn_up.weight",))
    assert "weights" in convert_fully(tmp_path / "a.gguf", tmp_path / "out").stderr
    written(model, tmp_path / "b.gguf", tensors={"blk.0.attn_q.bias": torch.ones(48)})
    assert "weights" in convert_fully(tmp_path / "b.gguf", tmp_path / "out").stderr
