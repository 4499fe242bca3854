"""What must hold under every release of transformers that pyproject.toml allows: `make
test-releases` runs this file, test_contract.py and test_serve.py under the lowest, the pinned and
the newest; in minutes. Three decoders unlike each other, an encoder-decoder, and folders that an
older commit wrote.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHORT, prompt, relative
from encoder_decoders import build as build_encoder_decoder
from encoder_decoders import logits as seq2seq_logits
from encoder_decoders import source as encoded
from encoder_decoders import target
from safetensors.torch import load_file
from test_model import load, logits, step_by_step
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lrkv_convert import convert
from lrkv_convert.evaluate.load import load_model
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes, formula_bytes_by_kind
from lrkv_convert.folder.travelling import refresh
from lrkv_convert.healing import heal
from lrkv_convert.modeling import auto_class
from lrkv_convert.modeling.contract_lrkv import CACHE

# RoPE and grouped queries; no positions in attention; QK-norm and windows
DECODERS = ["llama", "gpt2", "gemma3_text"]
# written by commit cf5a671 under transformers 5.23; `expected.safetensors`: what it gave then
GOLDEN = Path(__file__).parent / "golden"
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)
EXACT = 1e-4


# ----------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize(
    "cache",
    [
        lambda c: DynamicCache(config=c),
        lambda c: DynamicCache(),
        lambda c: StaticCache(config=c, max_cache_len=64),
    ],
    ids=["dynamic", "plain", "static"],
)
@pytest.mark.parametrize("family", DECODERS)
def test_cached_equals_uncached(family, cache, converted):
    """In a prefill, a second piece of several tokens, and token by token, beyond the window where
    there is one.
    """
    model, ids = load(converted(family)), prompt(50, batch=2)
    cache = cache(model.config)
    with torch.no_grad():
        pieces = [
            model(part, **{CACHE: cache}).logits for part in ids.split([30, 6] + 14 * [1], dim=1)
        ]
    assert relative(torch.cat(pieces, dim=1), logits(model, ids, use_cache=False)) < EXACT


@pytest.mark.parametrize("family", DECODERS)
def test_full_rank_is_exact(family, tiny, converted):
    model = load(converted(family, rank=20, force=True, calibration=[]))
    assert relative(logits(model, prompt()), logits(load(tiny(family)), prompt())) < EXACT


@pytest.mark.parametrize("family", DECODERS)
def test_allocated_bytes_equal_the_formula(family, converted):
    model = load(converted(family))
    assert cache_bytes(model(prompt(10), use_cache=True)[CACHE]) == 10 * formula_bytes(
        model.config, 4
    )


@pytest.mark.parametrize("family", DECODERS)
def test_generation(family, tiny, converted):
    """Greedy, from a static cache, with beams, with a draft model and in a left-padded batch, as
    without a cache.
    """
    model, ids = load(converted(family)), prompt(12)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(
        model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY), expected
    )
    assert torch.equal(
        model.generate(ids, num_beams=3, **GREEDY),
        model.generate(ids, num_beams=3, use_cache=False, **GREEDY),
    )
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    padded = torch.full((2, 15), 258)
    padded[0], padded[1, 3:] = prompt(15, seed=2), ids
    assert torch.equal(
        model.generate(padded, attention_mask=(padded != 258).long(), **GREEDY)[1, 15:],
        expected[0, 12:],
    )


def test_assisted_decoding_on_a_static_cache(tiny, converted):
    """Where the original can (from transformers 5.24 on)."""
    ids, static = (
        prompt(12),
        dict(
            prompt_lookup_num_tokens=3,
            cache_implementation="static",
            disable_compile=True,
            **GREEDY,
        ),
    )
    try:
        expected = load(tiny()).generate(ids, **static)
    except (ValueError, AttributeError) as error:
        pytest.skip(f"this transformers cannot: {error}")
    assert torch.equal(expected, load(tiny()).generate(ids, **GREEDY))
    model = load(converted())
    assert torch.equal(model.generate(ids, **static), model.generate(ids, **GREEDY))


def test_a_compiled_step_on_a_static_cache(converted):
    model, ids = load(converted()), prompt(36)
    cache = StaticCache(config=model.config, max_cache_len=64)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids[:, :30], **{CACHE: cache})
        found = torch.cat(
            [
                step(ids[:, t : t + 1], **{CACHE: cache}, position_ids=torch.tensor([[t]])).logits
                for t in range(30, 36)
            ],
            dim=1,
        )
    assert relative(found, logits(model, ids, use_cache=False)[:, 30:]) < EXACT


def test_a_quantised_cache(tiny, converted):
    """Rounding what is cached costs no more than it costs the original."""
    ids, missed = prompt(40), []
    for model in (load(tiny()), load(converted())):
        try:
            cache = QuantizedCache(config=model.config, backend="fp8")
        except ValueError as error:
            pytest.skip(f"this transformers has no such cache: {error}")
        found, exact = (
            step_by_step(model, ids, 30, cache)[:, 30:],
            logits(model, ids, use_cache=False)[:, 30:],
        )
        missed.append(((found - exact).norm() / exact.norm()).item())
    if missed[0] != missed[0]:
        pytest.skip("this torch's cast to FP8 overflows, for the original, too")  # 2.11
    assert missed[1] < 2 * missed[0] + 0.02


def test_continuous_batching(converted):
    model, rows = load(converted()), [prompt(12 + 8 * n, seed=n)[0].tolist() for n in range(2)]
    expected = [
        model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in rows
    ]
    # by itself 5.17 takes all the memory of a machine without a GPU
    few = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch(
        rows,
        generation_config=GenerationConfig(**{**GREEDY, "eos_token_id": -1}),
        continuous_batching_config=few,
    )
    assert sorted(o.generated_tokens for o in found.values()) == sorted(expected)


def test_healing(converted, sheep, tmp_path):
    heal(converted(), tmp_path / "healed", [str(sheep)], **SHORT)
    assert (
        relative(
            step_by_step(load(tmp_path / "healed"), prompt(), 30),
            logits(load(tmp_path / "healed"), prompt(), use_cache=False),
        )
        < EXACT
    )


@pytest.mark.parametrize(
    "case",
    [
        "rope-qk-norm-groups",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("position-free-bias-groups", "rotary", "full")
        ),
    ],
)
def test_the_kernel_equals_the_reference(case):
    """By Triton's interpreter."""
    pytest.importorskip("triton")
    from test_paths import TOLERANCE, error, kernel, problem, reference

    for tokens in (1, 63, 111):
        given = problem(case, tokens)
        assert error(kernel(**given), reference.decode(**given)) < TOLERANCE[torch.float32]


# ------------------------------------------------------------------------------- an encoder-decoder


def test_an_encoder_decoder(tmp_path):
    """Both caches: cached equals uncached, bytes are those of the formula, generation as without a
    cache.
    """
    convert(
        str(build_encoder_decoder("bart", tmp_path / "source")),
        tmp_path / "out",
        rank=7,
        calibration=[],
    )
    model = auto_class("bart").from_pretrained(tmp_path / "out").eval()
    given, ids = encoded(model, 2), target(2)
    whole = model(**given, decoder_input_ids=ids, use_cache=False).logits
    first = model(**given, decoder_input_ids=ids[:, :-2], use_cache=True)
    cache, formula = first[CACHE], formula_bytes_by_kind(model.config, 4)
    width = next(iter(given.values())).shape[1]
    assert (
        cache_bytes(cache.self_attention_cache) == 2 * (ids.shape[1] - 2) * formula["self"]
        and cache_bytes(cache.cross_attention_cache) == 2 * width * formula["cross"]
    )
    pieces = [first.logits] + [
        model(**given, decoder_input_ids=ids[:, t : t + 1], use_cache=True, **{CACHE: cache}).logits
        for t in range(ids.shape[1] - 2, ids.shape[1])
    ]
    assert relative(torch.cat(pieces, dim=1), whole) < EXACT
    for ways in ({}, {"num_beams": 3}):
        greedy = dict(max_new_tokens=8, do_sample=False, **{"num_beams": 1, **ways})
        assert torch.equal(
            model.generate(**given, **greedy), model.generate(**given, **greedy, use_cache=False)
        )
    original = auto_class("bart").from_pretrained(tmp_path / "source").eval()
    convert(str(tmp_path / "source"), tmp_path / "full", rank=20, force=True, calibration=[])
    assert (
        relative(
            seq2seq_logits(auto_class("bart").from_pretrained(tmp_path / "full").eval(), ids),
            seq2seq_logits(original, ids),
        )
        < EXACT
    )


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_folder_of_an_older_commit_gives_the_logits_it_gave(name):
    model, expected = (
        load_model(str(GOLDEN / name), torch.device("cpu"), torch.float32),
        load_file(GOLDEN / name / "expected.safetensors"),
    )
    assert relative(logits(model, expected["ids"], use_cache=False), expected["logits"]) < EXACT
    assert relative(step_by_step(model, expected["ids"], 10), expected["logits"]) < EXACT
    assert torch.equal(model.generate(expected["ids"][:1, :12], **GREEDY), expected["greedy"])


def test_an_encoder_decoder_of_an_older_commit_gives_the_logits_it_gave():
    expected = load_file(GOLDEN / "whisper" / "expected.safetensors")
    model = load_model(
        str(GOLDEN / "whisper"), torch.device("cpu"), torch.float32, auto=AutoModelForSpeechSeq2Seq
    )
    with torch.no_grad():
        first = model(
            input_features=expected["features"],
            decoder_input_ids=expected["ids"][:, :8],
            use_cache=True,
        )
        rest = model(
            input_features=expected["features"],
            decoder_input_ids=expected["ids"][:, 8:],
            use_cache=True,
            **{CACHE: first[CACHE]},
        ).logits
    assert relative(torch.cat((first.logits, rest), dim=1), expected["logits"]) < EXACT


ALONE = """
import sys
sys.modules["lrkv_convert"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto = sys.argv[1:3]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True,
    dtype=torch.float32).eval()
ids = load_file(sys.argv[3])["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits, "greedy": model.generate(ids[:1, :12],
        max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)}, sys.argv[4])
"""


def alone(folder: Path, ids: Path, out: Path) -> dict:
    """Logits and greedy text of a folder in a process without this package."""
    subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), "AutoModelForCausalLM", str(ids), str(out)],
        check=True,
        cwd=out.parent,
        capture_output=True,
    )
    return load_file(out)


def test_an_old_folder_brought_up_to_date_loads_without_this_package(tmp_path):
    folder, expected = (
        shutil.copytree(GOLDEN / "llama", tmp_path / "model"),
        load_file(GOLDEN / "llama" / "expected.safetensors"),
    )
    weights = (folder / "model.safetensors").read_bytes()
    assert (
        "contract_lrkv.py" in refresh(folder)
        and refresh(folder) == []
        and (folder / "model.safetensors").read_bytes() == weights
    )
    found = alone(folder, folder / "expected.safetensors", tmp_path / "found.safetensors")
    assert relative(found["logits"], expected["logits"]) < EXACT and torch.equal(
        found["greedy"], expected["greedy"]
    )


def test_what_a_folder_links_to_is_left_alone(tmp_path):
    """A snapshot of the hub is made of links to files that other snapshots share."""
    folder, blobs = shutil.copytree(GOLDEN / "llama", tmp_path / "model"), tmp_path / "blobs"
    blobs.mkdir()
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("modeling_lrkv_llama.", "elsewhere.")
    )
    for file in ("config.json", "models_lrkv.py"):
        (folder / file).rename(blobs / file)
        (folder / file).symlink_to(blobs / file)
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    assert {"config.json", "models_lrkv.py"} <= set(refresh(folder))
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before and not (
        folder / "config.json"
    ).is_symlink()


@pytest.mark.slow
def test_a_new_folder_loads_without_this_package(converted, tmp_path):
    found = alone(
        converted("gemma3_text"),
        GOLDEN / "qwen3" / "expected.safetensors",
        tmp_path / "found.safetensors",
    )
    ids, model = (
        load_file(GOLDEN / "qwen3" / "expected.safetensors")["ids"],
        AutoModelForCausalLM.from_pretrained(converted("gemma3_text")).eval(),
    )
    assert relative(found["logits"], logits(model, ids)) < EXACT
    assert torch.equal(found["greedy"], model.generate(ids[:1, :12], **GREEDY))
