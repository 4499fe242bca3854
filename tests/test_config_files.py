"""JSON of the wrong kind in a model folder, and folders whose files do not belong together: one
line from every command that reads them."""

import json
import shutil

import pytest
import torch
from conftest import prompt, run
from families import CONFIGS
from folders import convert_fully, save_safe
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert import convert

WRONG = ["[]", "null", "7", '"text"', "{", "", "[" * 100000]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Some text to measure on, of more than a window or two. " * 40)
    return file


def one_line(*arguments) -> str:
    result = run(*arguments, code=1)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: "), (
        result.stderr
    )
    return result.stderr


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused_everywhere(source, text, tmp_path) -> None:
    """By convert, eval and compare."""
    assert convert_fully(source, tmp_path / "out").exit_code
    one_line("eval", source, "--text", text, "--max-tokens", 100)
    one_line("compare", source, source, "--text", text, "--max-tokens", 100)


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_json_of_the_wrong_kind(file, content, source, text, tmp_path):
    (source / file).write_text(content)
    refused_everywhere(source, text, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": 7},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"id2label": ["a"]},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": -8},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": -3},
        {"hidden_size": 10**12},
        {"hidden_size": -48},
        {"hidden_size": "48"},
        {"vocab_size": 10**12},
        {"vocab_size": 2**63},
        {"vocab_size": -1},
        {"intermediate_size": 10**12},
        {"head_dim": 10**12},
        {"head_dim": -20},
        {"head_dim": [20]},
        {"rope_parameters": {"rope_type": "yoda", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "a lot"}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": [1]},
        {"hidden_act": "yoda"},
        {"rms_norm_eps": "small"},
        {"architectures": 7, "hidden_act": None},
    ],
    ids=str,
)
def test_config_fields_of_the_wrong_kind(changes, source, text, tmp_path):
    edit(source / "config.json", **changes)
    refused_everywhere(source, text, tmp_path)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gpt2", {"n_positions": 10**9}),
        ("gpt2", {"n_layer": 10**6}),
        ("gpt2", {"n_embd": 10**12}),
        ("gpt2", {"n_embd": 0}),
        ("gpt2", {"n_head": 0}),
        ("falcon", {"num_kv_heads": 0}),
        ("stablelm-norm", {"num_key_value_heads": 10**12}),
        ("codegen", {"n_positions": 10**12}),
        ("qwen2", {"layer_types": ["a"]}),
        ("qwen2", {"max_window_layers": "x"}),
    ],
    ids=str,
)
def test_config_fields_of_other_families(family, changes, tiny, text, tmp_path):
    source = shutil.copytree(tiny(family), tmp_path / "source")
    edit(source / "config.json", **changes)
    refused_everywhere(source, text, tmp_path)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {"num_attention_heads": 7}),
        ("mistral", {"num_attention_heads": 1}),
        ("llama", {"num_key_value_heads": 12}),
        ("gemma", {"hidden_size": 0}),
        ("mpt", {"d_model": 61}),
        ("gptj", {"rotary_dim": 9}),
        ("codegen", {"rotary_dim": 30}),
        ("falcon", {"num_kv_heads": 6}),
        ("falcon", {"num_attention_heads": 6}),
    ],
    ids=str,
)
def test_heads_that_no_attention_has(family, changes, tmp_path):
    """The weights are as the config says: transformers makes and loads such a model."""
    config = CONFIGS[family]()
    config.update(changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    assert "heads" in convert_fully(tmp_path / "in", tmp_path / "out").stderr


@pytest.mark.parametrize(
    "family, changes",
    [
        *((family, {"return_dict": False}) for family in ("llama", "gpt2", "falcon")),
        ("falcon", {"output_attentions": True, "output_hidden_states": True}),
        ("bloom", {"output_attentions": True}),
        ("mixtral", {"output_router_logits": True}),
    ],
    ids=str,
)
def test_what_a_config_has_its_model_give_out(family, changes, tiny, text, tmp_path):
    source = shutil.copytree(tiny(family), tmp_path / "source")
    edit(source / "config.json", **changes)
    run("convert", source, "--out", tmp_path / "out", "--calibration", text, "--cache-ratio", 0.6)
    run("compare", source, tmp_path / "out", "--text", text, "--max-tokens", 100)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written.get(name) for name in changes} == changes


def test_fields_of_ours_in_the_config_of_an_original(source, tmp_path):
    edit(source / "config.json", lrkv={"keys": 7}, lrkv_path="nowhere", lrkv_cross=3)
    assert convert_fully(source, tmp_path / "out").exit_code == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(prompt())


def test_a_refusal_of_several_lines_says_why(source, tmp_path):
    edit(source / "config.json", rms_norm_eps="small")
    assert "expected float" in convert_fully(source, tmp_path / "out").stderr
    edit(source / "config.json", rms_norm_eps="small " * 5000)
    assert len(convert_fully(source, tmp_path / "out").stderr) < 1000


@pytest.mark.parametrize(
    "parameters", [{"rope_theta": 0}, {"rope_theta": -3.0}, {"rope_type": "linear", "factor": 0}]
)
def test_frequencies_that_are_no_numbers(parameters, source, tmp_path):
    edit(
        source / "config.json",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4} | parameters,
    )
    assert "frequencies" in convert_fully(source, tmp_path / "out").stderr


def test_windows_that_see_nothing_are_not_converted(tiny, tmp_path):
    source = shutil.copytree(tiny("gpt_neo"), tmp_path / "source")
    edit(source / "config.json", window_size=0)
    assert "window_size" in convert_fully(source, tmp_path / "out").stderr


def test_several_ends_are_kept(source, tmp_path):
    edit(source / "generation_config.json", eos_token_id=[257, 5, 9])
    assert convert_fully(source, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [257, 5, 9]


def test_a_tokenizer_that_does_not_load_is_noted(source, tmp_path):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert not convert_fully(source, tmp_path / "without").stderr
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (source / "tokenizer.model").write_bytes(b"no sentencepiece")
    assert "note: no tokenizer is written" in convert_fully(source, tmp_path / "out").stderr


def test_token_ids_beyond_the_embedding(source, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken("text"), AddedToken("window"), AddedToken("the")])
    tokenizer.save_pretrained(source)
    for command in (
        [
            "convert",
            source,
            "--out",
            tmp_path / "out",
            "--rank",
            7,
            "--calibration",
            text,
            "--calibration-tokens",
            512,
        ],
        ["eval", source, "--text", text],
        ["compare", source, source, "--text", text],
        ["inspect", source, "--calibration", text, "--calibration-tokens", 512],
        ["compare", source, source, "--text", __file__, "--prompt", "a window", "--max-tokens", 3],
    ):
        assert "the tokenizer of" in one_line(*command) or "the id" in one_line(*command)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["original", "converted"])
def test_weights_that_are_not_finite_are_not_measured(
    which, value, tiny, converted, text, tmp_path
):
    folder = shutil.copytree(tiny() if which == "original" else converted(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[3] = value
    save_safe(tensors, folder / "model.safetensors")
    for command in (
        ["eval", folder, "--text", text],
        ["compare", tiny(), folder, "--text", text],
        ["bench", folder, folder, "--tokens", 64, "--steps", 1],
    ):
        assert "model.layers.1.mlp.up_proj.weight contains NaN or Inf" in one_line(*command)


def test_a_text_that_gives_nan_is_no_perplexity(source, text):
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)
    save_safe(tensors, source / "model.safetensors")
    assert "gives NaN on this text" in one_line("eval", source, "--text", text)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["lrkv"]["values"].update(
            base_width=[0] * len(c["lrkv"]["values"]["base_width"])
        ),
        lambda c: c["lrkv"]["keys"].update(rank=[0] * len(c["lrkv"]["keys"]["rank"])),
        lambda c: c["lrkv"]["values"].update(alignment=False),
        lambda c: c.update(num_hidden_layers=1),
        lambda c: c.update(lrkv=None),
        lambda c: c.update(lrkv=[]),
        lambda c: c["lrkv"].update(keys=None),
        lambda c: c["lrkv"]["keys"].update(rank="7"),
        lambda c: c["lrkv"]["keys"].update(rank=[10**12, 10**12]),
        lambda c: c["lrkv"]["keys"].update(rank=[-1, 7]),
        lambda c: c.update(num_hidden_layers=10**6),
        lambda c: c.update(vocab_size=10**12),
    ],
)
def test_a_converted_folder_whose_config_was_edited(change, tiny, converted, text, tmp_path):
    folder = shutil.copytree(converted(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    one_line("eval", folder, "--text", text)
    one_line("compare", tiny(), folder, "--text", text)
    healed = run(
        "heal", folder, "--data", text, "--out", tmp_path / "out", "--tokens", 4096, code=1
    )
    assert (
        healed.stderr.splitlines()[-1].startswith("error: ") and not (tmp_path / "out").exists()
    )  # what it does it says before


@pytest.mark.parametrize(
    "content",
    [
        *WRONG,
        {"format": 4},
        {"attention": None},
        {"attention": {"self": {"cache": []}}},
        {"source": None},
        {"source": {"name": 7}},
        {"history": None},
        {"history": [7]},
        {"attention": {"self": {"layers": [{}]}}},
        {"calibration": None},
        {"calibration": {"texts": 7}},
        {"recipe": []},
        {"attention": None},
        {"attention": {}},
        {"attention": {"self": 7}},
        {"evaluations": 7},
    ],
    ids=str,
)
def test_a_record_of_the_wrong_kind(content, tiny, converted, text, tmp_path):
    folder = shutil.copytree(converted(), tmp_path / "model")
    if isinstance(content, dict) and content.keys() & {"cache", "layers"}:
        fitted = json.loads((folder / "lrkv.json").read_text())["attention"]["self"]
        edit(folder / "lrkv.json", attention={"self": fitted | content})
    elif isinstance(content, dict):
        edit(folder / "lrkv.json", **content)
    else:
        (folder / "lrkv.json").write_text(content)
    for command in (
        ["compare", tiny(), folder, "--text", text, "--max-tokens", 50],
        ["compare", tiny(), folder, "--text", text, "--card", "--max-tokens", 50],
        ["heal", folder, "--data", text, "--out", tmp_path / "out", "--tokens", 4096],
        ["push", folder, "someone/model"],
    ):
        assert "lrkv" in one_line(*command)
    if not isinstance(content, dict) or "source" in content:
        one_line("inspect", folder, "--max-tokens", 20)


@pytest.mark.parametrize("content", [*WRONG, "{}", '{"model_type": 7}', '{"model_type": "llama"}'])
def test_refresh_of_a_config_of_the_wrong_kind(content, converted, tmp_path):
    folder = shutil.copytree(converted(), tmp_path / "model")
    (folder / "config.json").write_text(content)
    one_line("refresh", folder)


def test_a_whole_folder_is_still_compared_and_inspected(tiny, converted, text):
    assert run("compare", tiny(), converted(), "--text", text, "--max-tokens", 100).stdout
    assert run("inspect", converted(), "--max-tokens", 20).stdout


def test_a_converted_folder_saved_again_is_loaded(converted, text, tmp_path):
    """Its tensors are all in place, tied or not."""
    for family in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(converted(family))
        model.save_pretrained(tmp_path / family)
        AutoTokenizer.from_pretrained(converted(family)).save_pretrained(tmp_path / family)
        run("eval", tmp_path / family, "--text", text, "--max-tokens", 50)


def test_untied_weights_are_written_and_stay_untied(tiny, tmp_path):
    source = shutil.copytree(tiny("gpt2"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_safe(
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"] * 0.5},
        source / "model.safetensors",
    )
    done = convert(str(source), tmp_path / "out", rank=7, calibration_tokens=1024)
    assert "not tied" in done.notices[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        not model.config.tie_word_embeddings
        and not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
        and torch.isfinite(model(prompt()).logits).all()
    )
