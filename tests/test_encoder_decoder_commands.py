"""Encoder-decoders: what is written, what the commands print, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused, relative, run, tiny_tokenizer
from encoder_decoders import (
    CONFIGS,
    FLOAT32,
    PAIRS,
    STEPS,
    build,
    converted,
    corpora,
    data,
    load,
    logits,
    source,
    speech,
    stepwise,
    target,
    tiny,
    write_little,
)
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutomaticSpeechRecognitionPipeline, WhisperFeatureExtractor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Stack

from lrkv_convert import convert
from lrkv_convert.evaluate import bench, compare, load_tokenizer
from lrkv_convert.evaluate.bench import Contender, cross_writers, read_bytes
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes_by_kind
from lrkv_convert.evaluate.perplexity import Candidate, measure
from lrkv_convert.examples.example import IGNORED
from lrkv_convert.examples.pairs import read_pairs
from lrkv_convert.examples.prepare import prepare
from lrkv_convert.examples.reader import Reader
from lrkv_convert.families import FAMILIES
from lrkv_convert.modeling import ENCODER_DECODERS as ENCODER_DECODER_CLASSES
from lrkv_convert.modeling import attention_class, attention_lrkv, auto_class
from lrkv_convert.modeling.attention_lrkv import choose_path

LOAD = """
import json, sys
sys.modules["lrkv_convert"] = None
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
out = {}
for folder in sys.argv[1:]:
    speech = "whisper" in json.load(open(folder + "/config.json"))["model_type"]
    model = (AutoModelForSpeechSeq2Seq if speech else AutoModelForSeq2SeqLM).from_pretrained(
        folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(1, 8, 100, generator=generator,
        dtype=torch.float64).float() if speech else torch.randint(0, 256, (1, 11),
        generator=generator)
    with torch.no_grad():
        out[folder] = model(given, decoder_input_ids=torch.tensor([[256, 1, 2, 3]])).logits[0,
            -1].tolist()
print(json.dumps(out))
"""


@pytest.mark.slow
def test_all_load_in_a_fresh_process_without_this_package(converted, tmp_path):
    """Also one that was loaded and saved once more."""
    folders = {
        str(converted(family)): family for family in ("bart", "marian", "pegasus", "t5", "whisper")
    }
    load(converted("whisper")).save_pretrained(tmp_path / "again")
    folders[str(tmp_path / "again")] = "whisper"
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *folders],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, last in json.loads(result.stdout.strip().splitlines()[-1]).items():
        expected = logits(load(converted(folders[folder])), torch.tensor([[256, 1, 2, 3]]))[0, -1]
        assert relative(torch.tensor(last), expected) < FLOAT32, folder


UNEVEN = {
    "keys": {"base_width": [0, 16, 20], "rank": [7, 0, 7], "alignment": True},
    "values": {"base_width": [40, 0, 0], "rank": [0, 9, 7], "alignment": True},
}


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_layers_without_base_or_residual(family):
    """Of keys or of values, as planned conversions have them: what was written of cross-attention
    is read back as it was.
    """
    fields = {**CONFIGS[family]().to_dict(), "decoder_layers": 3, "num_decoder_layers": 3}
    config_class, _, model_class = ENCODER_DECODER_CLASSES[fields.pop("model_type")]
    torch.manual_seed(0)
    model, ids = (
        model_class(config_class(**fields, lrkv=UNEVEN, lrkv_cross=UNEVEN)).eval(),
        target(2, 9),
    )
    out, cache = stepwise(model, ids, 4)
    assert relative(out, logits(model, ids)) < STEPS
    assert (
        cache_bytes(cache.cross_attention_cache)
        == 2 * (50 if family == "whisper" else 11) * formula_bytes_by_kind(model.config, 4)["cross"]
    )
    plain = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    static = model.generate(
        **source(model, 2), **plain, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, model.generate(**source(model, 2), **plain, use_cache=False))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_kernel_reads_both_caches(family, converted):
    """In a step of one token; T5's self-attention, with a bias for each head, goes through the
    split path.
    """
    folder, ids = converted(family), target(1, 5)
    assert (
        relative(stepwise(load(folder, lrkv_path="kernel"), ids, 4)[0], logits(load(folder), ids))
        < STEPS
    )


@pytest.mark.parametrize("family", ENCODER_DECODER_CLASSES)
def test_a_gpu_takes_the_path_the_table_says(family, converted, monkeypatch):
    model, taken = load(converted(family)), set()

    def on_a_gpu(asked, **situation):
        taken.add(
            choose_path(
                asked, **situation | {"device": torch.device("cuda"), "dtype": torch.bfloat16}
            )
        )
        return "split"

    monkeypatch.setattr(attention_lrkv, "choose_path", on_a_gpu)
    monkeypatch.setattr(attention_lrkv, "missing_for_kernel", lambda *_: None)
    with torch.no_grad():
        stepwise(model, target(1, 3), 1)
    assert taken == {
        "kernel" if kind in attention_class(family).kernel else "split"
        for kind in FAMILIES[family].kinds
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_behind_padding(dtype, converted):
    """T5 adds its position bias to a mask of the smallest numbers there are."""
    model, ids, pad = load(converted("t5"), dtype), target(2, 8), 3
    padded, seen = (
        torch.cat((torch.full((2, pad), 258), ids), dim=1),
        torch.cat((torch.zeros(2, pad), torch.ones(2, 8)), dim=1).long(),
    )
    assert torch.isfinite(stepwise(model, padded, pad + 4, decoder_mask=seen)[0]).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_reloaded_model_says_nothing_is_missing(family, converted):
    model_type = family.split("-")[0]
    _, info = auto_class(model_type).from_pretrained(converted(family), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "whisper"])
def test_commands(family, tiny, data, tmp_path):
    """convert shows both kinds, compare their caches and the words, --card writes them down."""
    out, option = tmp_path / "out", "--audio" if family == "whisper" else "--pairs"
    dry = run(
        "convert", tiny(family), "--out", out, "--calibration", data(family), "--dry-run"
    ).output
    assert (
        "decoder self-attention" in dry
        and "cross-attention" in dry
        and "bytes/encoder position" in dry
        and not out.exists()
    )
    shown = run(
        "convert", tiny(family), "--out", out, "--attention", "cross", "--calibration", data(family)
    ).output
    assert (
        "cross-attention" in shown
        and "decoder self-attention" not in shown
        and f"{option} F" in shown
    )
    assert json.loads((out / "config.json").read_text())["lrkv"] is None
    result = tmp_path / "result.json"
    compared = run(
        "compare", tiny(family), out, option, data(family), "--json", result, "--card"
    ).output
    assert "same words" in compared and "cross/position" in compared
    rows = json.loads(result.read_text())["models"]
    assert (
        rows[1]["self_ratio"] == 1
        and rows[1]["cross_ratio"] <= 0.25
        and rows[0]["word_error_rate"] > 0
    )
    card = (out / "README.md").read_text()
    assert "same words" in card and "--attention cross" in card and str(tmp_path) not in card
    assert ("automatic-speech-recognition" in card) == (family == "whisper")
    assert (out / "preprocessor_config.json").is_file() == (family == "whisper")


def test_without_targets_the_model_writes_them(tiny, tmp_path):
    """For calibration and for comparison, and the record says so; a text's paragraphs are sources,
    cut where the model can read no more.
    """
    (tmp_path / "text.txt").write_text(
        "A first paragraph of five words.\n\nHeading\n\n" + "word " * 60
    )
    done = convert(
        str(tiny("bart")), tmp_path / "out", rank=7, calibration=[str(tmp_path / "text.txt")]
    )
    # one, and 300 tokens in windows of 78
    assert done.record.calibration.targets_by_the_model == done.record.calibration.examples == 5
    result = compare(
        [str(tiny("bart")), str(done.out)],
        [read_pairs(str(tmp_path / "text.txt"))],
        device=torch.device("cpu"),
    )
    assert (
        result["texts"][0]["targets_by_the_first_model"] == 5
        and result["models"][0]["word_error_rate"] is None
    )
    assert "written by the source model itself" in (done.out / "README.md").read_text()


def test_built_in_text_is_the_default_of_text_models(tiny, tmp_path):
    done = convert(str(tiny("t5")), tmp_path / "out", rank=7, calibration_tokens=600)
    assert (
        done.record.calibration.texts[0].name == "built-in" and done.record.calibration.examples > 1
    )


def test_old_names_are_read(tiny, tmp_path):
    """Checkpoints of the base model alone, and those that hold tied tensors under another of their
    names.
    """
    folder = Path(shutil.copytree(tiny("bart"), tmp_path / "source"))
    state = load_file(folder / "model.safetensors")
    assert "model.shared.weight" in state
    state["model.encoder.embed_tokens.weight"] = state.pop("model.shared.weight")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    assert (
        relative(logits(load(tmp_path / "out"), target()), logits(load(tiny("bart")), target()))
        < FLOAT32
    )


def test_positions_that_no_checkpoint_holds_are_made(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("pegasus"), tmp_path / "source"))
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "embed_positions" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    assert (
        relative(logits(load(tmp_path / "out"), target()), logits(load(tiny("pegasus")), target()))
        < FLOAT32
    )


class TestRefusals:
    def test_kinds_of_attention(self, tiny, tmp_path):
        refused(
            tiny("bart"),
            tmp_path / "out",
            "--attention",
            "encoder",
            says="unknown attention 'encoder'",
        )

    def test_decoders_have_no_cross_attention(self, tmp_path):
        from conftest import build as build_decoder

        source = build_decoder("gpt2", tmp_path / "source")
        refused(source, tmp_path / "out", "--attention", "self,cross", says="no cross-attention")

    def test_speech_needs_speech(self, tiny, data, tmp_path):
        refused(tiny("whisper"), tmp_path / "out", says="a speech model is calibrated on speech")
        refused(
            tiny("whisper"),
            tmp_path / "out",
            "--calibration",
            data("bart"),
            says="no folder of .wav files",
        )
        refused(
            tiny("bart"),
            tmp_path / "out",
            "--calibration",
            "self",
            says="an encoder-decoder reads something before it writes",
        )
        folder = Path(shutil.copytree(tiny("whisper"), tmp_path / "source"))
        (folder / "preprocessor_config.json").unlink()
        refused(
            folder, tmp_path / "out", "--calibration", data("whisper"), says="no feature extractor"
        )

    def test_keys_that_turn(self, tiny, tmp_path):
        refused(
            tiny("t5"),
            tmp_path / "out",
            "--keys",
            "rotary",
            "--calibration",
            "none",
            says="needs RoPE",
        )

    def test_too_long_a_source(self, tiny, tmp_path):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "x" * 100, "target": "y"}))
        assert "pairs.jsonl:1" in refused(
            tiny("bart"),
            tmp_path / "out",
            "--calibration",
            str(tmp_path / "pairs.jsonl"),
            says="more than the 80 the model reads",
        )

    @pytest.mark.parametrize("name", ["compare", "eval"])
    def test_plain_text_is_for_decoders(self, name, tiny, converted, tmp_path):
        (tmp_path / "text.txt").write_text("some words " * 400)
        models = [tiny("bart"), converted("bart")][: 2 if name == "compare" else 1]
        error = run(name, *models, "--text", tmp_path / "text.txt", code=1).stderr.strip()
        assert len(error.splitlines()) == 1 and "encoder-decoder" in error, error

    def test_pairs_are_for_encoder_decoders(self, data, tmp_path):
        from conftest import build as build_decoder

        error = run(
            "eval", build_decoder("gpt2", tmp_path / "source"), "--pairs", data("bart"), code=1
        ).stderr
        assert "has no encoder: it reads plain text; give --text" in error

    @pytest.mark.parametrize("family, most", [("whisper", 66), ("bart", 66)])
    def test_more_tokens_than_the_decoder_holds(self, family, most, tiny):
        error = run("bench", tiny(family), "--tokens", 70, "--paths", "auto", code=1).stderr.strip()
        assert "reads 80 tokens, and 70 leave no room for the 14 that are decoded" in error
        assert f"give --tokens of at most {most}" in error and len(error.splitlines()) == 1

    def test_comparing_with_the_wrong_thing(self, tiny, data, converted, tmp_path):
        for family, option, other in (
            ("bart", "--audio", "whisper"),
            ("whisper", "--pairs", "bart"),
        ):
            error = run(
                "compare", tiny(family), converted(family), option, data(other), code=1
            ).stderr
            assert "reads text" in error or "reads speech" in error
        assert (
            "does not go with"
            in run(
                "compare",
                tiny("bart"),
                converted("bart"),
                "--pairs",
                data("bart"),
                "--prompt",
                "x",
                code=1,
            ).stderr
        )
        assert (
            "than the first model"
            in run(
                "compare", tiny("bart"), converted("whisper"), "--pairs", data("bart"), code=1
            ).stderr
        )


def test_the_pipeline_of_transformers_takes_a_converted_whisper_for_what_transcribes(converted):
    model = load(converted("whisper"))
    tokenizer, features = tiny_tokenizer(), WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    transcribe = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=tokenizer, feature_extractor=features
    )
    assert transcribe.type == "seq2seq"
    assert isinstance(
        transcribe(
            {"raw": torch.zeros(16000).numpy(), "sampling_rate": 16000},
            generate_kwargs={"max_new_tokens": 4},
        )["text"],
        str,
    )


@pytest.mark.parametrize(
    "command, says",
    [
        (
            ["compare", "{whisper}", "{whisper}", "--text", "{text}"],
            "an encoder-decoder, which reads speech; lrkv compare takes it with --audio FOLDER",
        ),
        (["compare", "{t5}", "{t5}"], "--pairs FILE"),
        (
            ["compare", "{t5}", "{t5}", "--pairs", "{pairs}", "--cache", "fp8"],
            "--cache does not go with",
        ),
        (["serve", "{t5}"], "--pairs FILE"),
        (["eval", "{bart}"], "--pairs FILE"),
        (["eval", "{t5}", "--pairs", "{pairs}", "--seq-len", "64"], "--seq-len does not go with"),
        (["eval", "{t5}", "--pairs", "{pairs}", "--text", "{text}"], "--text does not go with"),
        (["eval", "{t5}", "--pairs", "{pairs}", "--batch-size", "2"], "--batch-size does not go"),
        (["convert", "{t5}", "--out", "{t5}-out", "--attention", "both"], "self,cross for both"),
    ],
)
def test_commands_say_what_such_a_model_reads(command, says, tiny, data):
    names = {
        "whisper": tiny("whisper"),
        "t5": tiny("t5"),
        "bart": tiny("bart"),
        "pairs": data("t5"),
        "text": __file__,
    }
    result = run(*(part.format(**names) for part in command), code=1)
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_figures_on_what_a_model_was_calibrated_on_say_so(tiny, data, tmp_path):
    run(
        "convert",
        tiny("bart"),
        "--out",
        tmp_path / "half",
        "--rank",
        7,
        "--calibration",
        data("bart"),
    )
    seen = run("compare", tiny("bart"), tmp_path / "half", "--pairs", data("bart"), "--card")
    assert (
        "half was calibrated on pairs.jsonl" in seen.stdout
        and "**Calibrated on pairs.jsonl" in (tmp_path / "half" / "README.md").read_text()
    )


def test_little_to_calibrate_on_is_said(tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    assert (
        "fewer than the model is wide"
        in run(
            "convert",
            tiny("bart"),
            "--out",
            tmp_path / "out",
            "--rank",
            7,
            "--calibration",
            tmp_path / "pairs.jsonl",
        ).stdout
    )


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def by_hand(model, example) -> torch.Tensor:
    """Losses of an example's targets behind the prompt, without a cache, in one go."""
    out = model(**example.inputs, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(out, example.predicts, reduction="none")
    return losses[example.predicts != IGNORED]


def examples_of(family, folder, model, path) -> list:
    """What a model of the family is measured on, as `compare` and `eval` read it."""
    reader = Reader(
        folder,
        FAMILIES[family],
        load_tokenizer(str(folder)),
        model.config,
        model.generation_config,
    )
    return prepare(corpora(path), reader, None, lambda: model).examples()


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_eval_is_a_plain_loop_over_the_targets(family, tiny, converted, data, tmp_path):
    """Perplexity and bytes of both caches of one model alone, as `compare` gives them."""
    option = "--audio" if family == "whisper" else "--pairs"
    for folder in (tiny(family), converted(family)):
        shown = run("eval", folder, option, data(family), "--json", tmp_path / "e.json").output
        [row] = json.loads((tmp_path / "e.json").read_text())["models"]
        model = load(folder)
        examples = examples_of(family, tiny(family), model, data(family))
        losses = torch.cat([by_hand(model, example) for example in examples])
        assert row["nll"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert row["tokens"] == len(losses) and f"{row['perplexity']:.3f}" in shown
        formula = formula_bytes_by_kind(model.config, 4)
        for kind in ("self", "cross"):
            cache = row["caches"][kind]
            assert cache["bytes"] == cache["allocated"] == formula[kind] == row[f"{kind}_bytes"]
        assert row["word_error_rate"] > 0 and "WER" in shown and "same words" not in shown


def test_targets_too_long_for_one_pass_are_read_through_the_cache(tiny, converted, data):
    models = [load(tiny("t5")), load(converted("t5"))]
    examples = examples_of("t5", tiny("t5"), models[0], data("t5"))
    found = [measure([*map(Candidate, models)], examples, longest=longest) for longest in (1024, 5)]
    for a, b in zip(*found, strict=True):
        assert a.tokens == b.tokens and a.mean("nll") == pytest.approx(b.mean("nll"), rel=1e-5)
        assert a.mean("kl") == pytest.approx(b.mean("kl"), rel=1e-3, abs=1e-8)


def test_models_with_the_same_encoder_encode_once(tiny, converted, data, tmp_path):
    """A conversion leaves the encoder as it is; another encoder is heard by its own model."""
    other = load(tiny("t5"))
    torch.nn.init.normal_(other.get_encoder().final_layer_norm.weight)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    paths = [str(tiny("t5")), str(converted("t5")), str(tmp_path / "other")]
    calls = []
    hook = register_module_forward_pre_hook(
        lambda module, args: (
            calls.append(module) if isinstance(module, T5Stack) and not module.is_decoder else None
        )
    )
    try:
        result = compare(paths, corpora(data("t5")), device=torch.device("cpu"))
    finally:
        hook.remove()
    counts = [calls.count(model) for model in dict.fromkeys(calls)]
    assert counts == [len(PAIRS)] * 2 and result["models"][2]["kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["self", "cross", "self,cross"])
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_bench_fills_both_caches(family, attention, tiny, converted, monkeypatch):
    """With tokens and with the encoder's positions, and counts what a step reads of them."""
    # the rate of a plain copy takes seconds to measure, and is not looked at here
    monkeypatch.setattr(sys.modules[Contender.__module__], "bandwidth", lambda device: 1e9)
    folders = [str(tiny(family)), str(converted(family, attention=attention))]
    positions = 50 if family == "whisper" else 20
    for cache in ("static", "dynamic"):
        result = bench(
            folders,
            tokens=[20],
            batches=[2],
            routes=["auto", "rebuild", "split"],
            cache=cache,
            steps=1,
            device=torch.device("cpu"),
        )
        rows, room = result["rows"], (3 + 1 + 2) * 3 if cache == "static" else 0
        assert [r["path"] for r in rows] == ["original", "auto: split", "rebuild", "split"]
        for row, folder in zip(rows, (folders[0], *folders[1:] * 3)):
            model = load(folder)
            per_place = formula_bytes_by_kind(model.config, 4)
            assert row["positions"] == positions and row["caches"] == {
                "self": 2 * (20 + room) * per_place["self"],
                "cross": 2 * positions * per_place["cross"],
            }
            assert row["cache_bytes"] == sum(row["caches"].values())
            assert row["bytes_read"] == row["cache_bytes"] + read_bytes(model)


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "whisper"])
def test_a_step_reads_the_decoder_and_the_head(family, tiny, converted):
    """And neither the encoder nor what writes the cache of cross-attention: what is not read may be
    anything.
    """
    for folder in (tiny(family), converted(family)):
        model, ids = load(folder), target(2, 6)
        _, cache = stepwise(model, ids, 5)
        cache, again = copy.deepcopy(cache), copy.deepcopy(cache)
        states = BaseModelOutput(last_hidden_state=torch.zeros(2, positions_of(cache), 1))
        step = lambda cache: (
            model(
                decoder_input_ids=ids[:, :1], encoder_outputs=states, past_key_values=cache
            ).logits
        )
        with torch.no_grad():
            expected = step(cache)
            spoilt = {p.data_ptr(): p for p in model.parameters()}
            whole = sum(p.numel() * 4 for p in spoilt.values())
            read = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
            writers = {p.data_ptr() for p in cross_writers(model)}
            kept = {p.data_ptr() for p in read} - writers
            unread = [p for at, p in spoilt.items() if at not in kept]
            for parameter in unread:
                parameter.fill_(float("nan"))
            assert torch.equal(step(again), expected)
        own = model.get_input_embeddings().weight
        tied = own.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        left = sum(p.numel() * 4 for p in unread) + (0 if tied else own.numel() * 4)
        assert read_bytes(model) == whole - left


def positions_of(cache) -> int:
    return int(cache.cross_attention_cache.get_seq_length())


def test_bench_as_a_command(tiny, converted, tmp_path):
    shown = run(
        "bench",
        tiny("whisper"),
        converted("whisper"),
        "--tokens",
        20,
        "--steps",
        1,
        "--paths",
        "auto",
        "--json",
        tmp_path / "b.json",
    ).output
    assert "cross-attention, 50 positions" in shown
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 2
