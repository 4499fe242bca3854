"""The output folder: what is in it, that it is the same from every form of the source, and that it
loads anywhere.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, build, prompt, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lrkv_convert import convert, read_folder
from lrkv_convert.evaluate.memory import cache_bytes

LOAD = """
import sys
if {blocked}: sys.modules["lrkv_convert"] = None      # as if it were not installed
elif {imported}: import lrkv_convert
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, **{options})
ids = torch.tensor([{ids}])
print(type(model).__name__, type(model).__module__)
print(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None,
    pad_token_id=258).tolist())
"""


def fresh(folder, tmp_path, blocked, imported, **options):
    code = LOAD.format(
        blocked=blocked,
        imported=imported,
        folder=str(folder),
        options=options,
        ids=prompt(12)[0].tolist(),
    )
    env = dict(os.environ, HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
def test_loads_in_a_fresh_process_without_this_package(family, converted, tmp_path):
    done = fresh(converted(family), tmp_path, blocked=True, imported=False, trust_remote_code=True)
    assert done.returncode == 0, done.stderr
    module, tokens = done.stdout.splitlines()[-2:]
    assert " transformers_modules" in module
    here = AutoModelForCausalLM.from_pretrained(converted(family))
    assert tokens == str(
        here.generate(
            prompt(12), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=258
        ).tolist()
    )


@pytest.mark.slow
def test_loads_without_trust_where_this_package_is_imported(converted, tmp_path):
    done = fresh(converted(), tmp_path, blocked=False, imported=True)
    assert done.returncode == 0, done.stderr
    assert " lrkv_convert.modeling" in done.stdout.splitlines()[-2]


def test_without_package_and_trust_loading_fails_clearly(converted, tmp_path):
    done = fresh(converted(), tmp_path, blocked=True, imported=False)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr
    assert "Lrkv" not in done.stdout and "[[" not in done.stdout  # no model, no tokens


def test_the_folder_holds_what_it_should(family, converted, tiny):
    folder = converted(family)
    names = {p.name for p in folder.iterdir()}
    modeling = f"modeling_lrkv_{family.split('-')[0]}.py"
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "lrkv.json",
        "README.md",
        "cache.png",
        "attention_lrkv.py",
        "cache_lrkv.py",
        "codes_lrkv.py",
        "integer_lrkv.py",
        "contract_lrkv.py",
        "factors_lrkv.py",
        "forms_lrkv.py",
        "kernel_lrkv.py",
        "models_lrkv.py",
        modeling,
    } == names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "lrkv_" + family.split("-")[0]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert len(config["lrkv"]["keys"]["rank"]) == config.get(
        "num_hidden_layers", config.get("n_layer")
    )


def test_the_record_tells_how_to_reproduce_it(converted, tiny):
    record = read_folder(converted()).record
    weights = (tiny() / "model.safetensors").read_bytes()
    assert record.source.sha256 == hashlib.sha256(weights).hexdigest()
    assert record.recipe["rank"] == 7 and record.recipe["base"] == "joint"
    fitted = record.attention["self"]
    assert fitted.cache.kv_ratio == pytest.approx((20 + 3 * 7) / (3 * 20))
    assert [layer.keys.rank for layer in fitted.layers] == [7, 7]
    assert all(0 < side.error < 1 for layer in fitted.layers for side in (layer.keys, layer.values))
    [text] = record.calibration.texts
    assert text.name == "built-in" and len(text.sha256) == 64
    assert record.calibration.tokens == 1024
    assert record.versions.torch == torch.__version__
    assert record.seconds > 0 and record.peak_memory_bytes > 0


def test_the_model_card_states_the_cache(converted):
    card = (converted() / "README.md").read_text()
    ratio = read_folder(converted()).record.attention["self"].cache.kv_ratio
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert f"{ratio:.1%}" in card and "trust_remote_code=True" in card


def test_conversion_is_deterministic(converted, tiny, tmp_path):
    convert(str(tiny()), tmp_path / "again", rank=7, calibration_tokens=1024)
    a, b = (load_file(folder / "model.safetensors") for folder in (converted(), tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sharded_in_and_out(tiny, converted, tmp_path):
    source = build("llama", tmp_path / "source", max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(str(source), tmp_path / "out", rank=7, calibration_tokens=1024, max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and {s.name for s in shards} == set(index["weight_map"].values())
    ids = prompt()
    assert torch.equal(
        *(
            AutoModelForCausalLM.from_pretrained(f)(ids).logits
            for f in (tmp_path / "out", converted())
        )
    )


def test_bare_gpt2_names_and_mask_buffers_are_understood(tiny, converted, tmp_path):
    """As OpenAI's own upload: no "transformer." prefix, mask buffers beside the weights."""
    source = build("gpt2", tmp_path / "source")
    tensors = {
        n.removeprefix("transformer."): t
        for n, t in load_file(source / "model.safetensors").items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(tensors, source / "model.safetensors")
    convert(str(source), tmp_path / "out", rank=7, calibration_tokens=1024)
    ids = prompt()
    assert torch.equal(
        *(
            AutoModelForCausalLM.from_pretrained(f)(ids).logits
            for f in (tmp_path / "out", converted("gpt2"))
        )
    )


def test_pickled_weights_are_read_as_weights_only(tiny, converted, tmp_path):
    source = build("llama", tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(str(source), tmp_path / "out", rank=7, calibration_tokens=1024)
    ids = prompt()
    assert torch.equal(
        *(
            AutoModelForCausalLM.from_pretrained(f)(ids).logits
            for f in (tmp_path / "out", converted())
        )
    )


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_dtype_is_the_sources_unless_asked(dtype, tiny, tmp_path):
    done = convert(str(tiny()), tmp_path / "out", rank=7, calibration=[], dtype=dtype)
    assert done.record.recipe["metric"] == "attention"  # without text there is no gradient
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        found = {handle.get_tensor(name).dtype for name in handle.keys()}  # noqa: SIM118
    assert found == {torch.float32 if dtype == "auto" else torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype in found


def test_bf16_factors_cost_little(tiny, converted, tmp_path):
    convert(str(tiny()), tmp_path / "out", rank=7, calibration_tokens=1024, dtype="bfloat16")
    ids = prompt(200)
    full, half = (
        torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits, -1
        )
        for f in (converted(), tmp_path / "out")
    )
    original = torch.log_softmax(AutoModelForCausalLM.from_pretrained(tiny())(ids).logits, -1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1).mean().item()
    assert kl(full, half) < 0.1 * kl(original, full)


def test_a_model_that_reads_less_than_a_window_is_calibrated_too(tmp_path):
    config = CONFIGS["gpt2"]()
    config.n_positions = 100
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", rank=7, calibration_tokens=1000)
    assert json.loads((tmp_path / "out" / "lrkv.json").read_text())["calibration"]["seq_len"] == 100


def test_overwrite_replaces_an_earlier_conversion(tiny, tmp_path):
    convert(str(tiny()), tmp_path / "out", rank=3, calibration=[])
    convert(str(tiny()), tmp_path / "out", rank=5, calibration=[], overwrite=True)
    assert json.loads((tmp_path / "out" / "lrkv.json").read_text())["recipe"]["rank"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_calibration_and_refit_lower_the_loss_of_the_logits(tiny, converted):
    """Each step of the method is closer to the original than the one before, on text it did not
    see.
    """
    from lrkv_convert.examples.text import Text, windows

    ids = windows(
        [
            Text(
                "held out",
                "The quick brown fox jumps over the lazy dog; 3.14159 is not a rational number. "
                * 30,
            )
        ],
        tiny_tokenizer(),
        256,
        1024,
    )
    original = torch.log_softmax(AutoModelForCausalLM.from_pretrained(tiny("gpt2"))(ids).logits, -1)
    kls = []
    for options in (
        dict(base="mean", calibration=()),
        dict(base="joint", calibration=()),
        dict(base="joint", refit=False),
        dict(base="joint"),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            converted(
                "gpt2",
                **{
                    **options,
                    **({"calibration_tokens": 8192} if "calibration" not in options else {}),
                },
            )
        )
        logp = torch.log_softmax(model(ids).logits, -1)
        kls.append((original.exp() * (original - logp)).sum(-1).mean().item())
    assert kls == sorted(kls, reverse=True), kls


@pytest.mark.parametrize("ratio", [0.4, pytest.param(0.5, marks=pytest.mark.slow), 0.62])
def test_a_cache_ratio_is_met_by_the_live_cache(ratio, tiny, tmp_path):
    options = dict(cache_ratio=ratio, bits="16", calibration_tokens=1024)
    plan = convert(str(tiny()), tmp_path / "out", **options).plan
    assert ratio - 0.1 < plan.ratio <= ratio
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cache_bytes(model(prompt(10)).past_key_values) == 10 * plan.bytes_after


def test_a_quarter_of_the_cache_is_the_default_and_half_of_numbers(tiny, tmp_path):
    plan = lambda **options: convert(str(tiny()), tmp_path / "out", dry_run=True, **options).plan
    coded = plan(dtype="bfloat16", calibration_tokens=1024)
    assert 0.2 < coded.ratio <= 0.25 and all(s.keys.coded and s.values.coded for s in coded.sites)
    numbers = plan(bits="16", calibration_tokens=1024)
    assert 0.42 < numbers.ratio <= 0.5 and not any(s.keys.coded for s in numbers.sites)
    assert not (tmp_path / "out").exists()
    # nothing to plan with
    uniform = plan(calibration=[])
    first = uniform.sites[0]
    assert uniform.ratio <= 0.5 and first.keys.rank < first.values.rank


@pytest.mark.parametrize("width, rank", [(0, 12), (40, 0), (33, 3)])
def test_the_base_width_opens_the_family(width, rank, tiny, tmp_path):
    """From per-head (m = 0) to one joint latent (r = 0): converts, and generates the same with and
    without its cache.
    """
    convert(str(tiny()), tmp_path / "out", base_width=width, rank=rank, calibration_tokens=1024)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert cache_bytes(model(prompt(10)).past_key_values) == 10 * 4 * 2 * 2 * (width + 3 * rank)
    greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=258)
    assert torch.equal(
        model.generate(prompt(9), **greedy), model.generate(prompt(9), use_cache=False, **greedy)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"base": "pooled", "base_width": 20, "rank": 0},
        {"base": "grouped", "base_width": 24, "rank": 0},
        {"base": "joint", "base_width": 0, "rank": 8, "metric": "whitened"},
        {"rank": 7, "metric": "plain"},
        {"rank": 7, "metric": "attention"},
    ],
    ids=str,
)
def test_peers_methods_convert_and_load(options, tiny, tmp_path):
    convert(str(tiny()), tmp_path / "out", calibration_tokens=1024, **options)
    assert torch.isfinite(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(prompt()).logits
    ).all()


def test_gguf_is_read(tmp_path):
    """A GGUF file written from a tiny Llama converts, with the tokenizer inside the file."""
    gguf = pytest.importorskip("gguf")
    from gguf_fixture import write_gguf
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.head_dim, config.hidden_size = 8, 48
    model = LlamaForCausalLM(config)
    write_gguf(gguf, model, tmp_path / "tiny.gguf")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", rank=8, force=True, calibration=[])
    ids = prompt(30)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits,
        model.eval()(ids).logits,
    )
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert json.loads((tmp_path / "out" / "lrkv.json").read_text())["source"]["path"].endswith(
        "tiny.gguf"
    )


KEY_FORMS = [
    dict(keys="per-head", rank=9),
    dict(keys="rotary", rank=7),
    dict(keys="rotary", rank=0),
    dict(keys="commuting", base_width_k=30, rank_k=0, rank_v=7),
    dict(keys="commuting", rank=7),
    dict(keys="full", rank_v=7),
    dict(keys="commuting", cache_ratio=0.5),
    dict(keys="rotary", cache_ratio=0.6),
    dict(keys="full", cache_ratio=0.7),
    dict(keys="per-head", cache_ratio=0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", KEY_FORMS, ids=str)
def test_every_form_of_keys_is_planned_cached_and_decoded(options, tiny, tmp_path):
    plan = convert(
        str(tiny("llama-bias")), tmp_path / "out", calibration_tokens=1024, **options
    ).plan
    assert plan.keys == options["keys"] and plan.ratio <= options.get("cache_ratio", 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert cache_bytes(model(prompt(10)).past_key_values) == 10 * plan.bytes_after
    greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)
    assert torch.equal(
        model.generate(prompt(9), **greedy), model.generate(prompt(9), use_cache=False, **greedy)
    )
    assert torch.equal(
        model.generate(prompt(9), cache_implementation="static", **greedy),
        model.generate(prompt(9), **greedy),
    )
    alone, padded = prompt(9), torch.cat((torch.full((1, 4), 258), prompt(9)), 1)
    mask = (padded != 258).long()
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **greedy)[:, 13:],
        model.generate(alone, **greedy)[:, 9:],
    )


# those of which nothing is lost
WHOLE = {
    "rotary": {"rank": 20},
    "commuting": {"base_width_k": 60, "rank_k": 0, "rank_v": 20},
    "full": {"rank_v": 20},
}


@pytest.mark.parametrize("keys", WHOLE)
@pytest.mark.parametrize("family", ["llama-bias", "llama-mha-yarn", "mistral", "qwen2"])
def test_rotated_cached_keys_are_exact(keys, family, tiny, tmp_path):
    """At full rank, with left padding and cached in two steps past the sliding window: the
    original's logits.
    """
    convert(
        str(tiny(family)),
        tmp_path / "out",
        keys=keys,
        force=True,
        calibration=[],
        **WHOLE[keys],
    )
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "out", tiny(family))
    )
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :5] = 0
    cached = []
    for model in (ours, theirs):
        first = model(ids[:, :31], attention_mask=mask[:, :31], use_cache=True)
        rest = [
            model(
                ids[:, i : i + 1],
                attention_mask=mask[:, : i + 1],
                past_key_values=first.past_key_values,
            ).logits
            for i in range(31, 40)
        ]
        cached.append(torch.cat([first.logits, *rest], 1)[mask.bool()])
    assert (cached[0] - cached[1]).abs().max() < 1e-4 * cached[1].abs().max()


def test_reading_cost_orders_the_forms_of_keys(tiny, tmp_path):
    """Flops to read a token back: full < commuting < rotary < per-head < joint at the same bytes of
    keys; before: two products of H G d.
    """
    plans = {
        keys: convert(str(tiny()), tmp_path / "out", dry_run=True, calibration=[], **options).plan
        for keys, options in {
            "joint": dict(rank=7),
            "rotary": dict(keys="rotary", rank=7),
            "commuting": dict(keys="commuting", base_width_k=40, rank_k=0, rank_v=7),
            "per-head": dict(keys="per-head", rank_k=14, rank_v=7),
            "full": dict(keys="full", rank_v=7),
        }.items()
    }
    flops = {keys: plan.flops_after for keys, plan in plans.items()}
    assert flops["full"] < flops["commuting"] < flops["rotary"] < flops["per-head"] < flops["joint"]
    H, G, d, L = 3, 2, 20, 2
    assert plans["joint"].flops_before == 2 * L * 2 * H * G * d
    assert flops["joint"] == 2 * L * (H * (20 + 7) * d + H * G * d + H * G * (20 + 7))


def test_calibration_on_the_models_own_text(tiny, tmp_path):
    done = convert(
        str(tiny()), tmp_path / "out", rank=7, calibration=["self"], calibration_tokens=1024
    )
    again = convert(
        str(tiny()), tmp_path / "again", rank=7, calibration=["self"], calibration_tokens=1024
    )
    read = done.record.calibration
    assert [text.name for text in read.texts] == ["self"] and read.tokens == 1024
    # sampling is seeded
    assert read.texts == again.record.calibration.texts


def test_memory_holds_one_layer(tiny, tmp_path):
    """Whenever a layer has seen a window, no other layer's weights are there, nor the embeddings;
    the same when its gradients are taken.
    """
    from lrkv_convert.examples.example import windows_of
    from lrkv_convert.folder.store import Store
    from lrkv_convert.observe.calibrate import calibrate
    from lrkv_convert.observe.sensitivity import head_moments
    from lrkv_convert.study import Study

    study, seen = Study(str(tiny("llama-bias"))), []
    skeleton, examples = study.build(torch.device("cpu")), windows_of(prompt(512, batch=2))
    model = skeleton.model

    def look(module, *_):
        if not isinstance(module, LlamaDecoderLayer):
            return
        there = {
            name.split(".")[2]
            for name, p in model.named_parameters()
            if name.startswith("model.layers.") and not p.is_meta
        }
        assert len(there) == 1 and all(
            p.is_meta
            for name, p in model.named_parameters()
            if not name.startswith("model.layers.")
        )
        seen.append(*there)

    hook, store = register_module_forward_hook(look), Store(tmp_path / "store", {})
    try:
        calibrate(skeleton, study.sites, examples, {"fisher"}, store, keep=[0])
        head_moments(skeleton, study.sites, examples, [0], store)
    finally:
        hook.remove()
    # two windows forward, then each layer once for the gradients of one
    assert seen == ["0", "0", "1", "1", "1", "0"]
