"""What must hold for every family and variant (families.py): one class, run for each of them."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, prompt, refused, relative, run
from families import CONFIGS
from safetensors.torch import load_file, save_file
from test_model import FLOAT32, FLOAT64, STEPS, load, logits, step_by_step
from transformers import AutoModelForCausalLM, DynamicCache

from lrkv_convert import LrkvError, convert
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.families import FAMILIES as KNOWN
from lrkv_convert.families import family_named
from lrkv_convert.families.table import readme_rows
from lrkv_convert.modeling import FAMILIES, attention_class, attention_lrkv
from lrkv_convert.modeling.attention_lrkv import choose_path
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.study import Study
from lrkv_convert.train.student import choose_trained, set_precision

QUICK = dict(calibration=[])  # the weights alone


@pytest.mark.parametrize("family", CONFIGS)
class TestFamily:
    def test_weights_are_put_together_again(self, family, tiny):
        """Heads hold every number of the original's projections, each once, where the adapter
        says.
        """
        study = Study(str(tiny(family)))
        checkpoint, adapter = study.checkpoint, study.family.any
        weights, at = adapter.split(checkpoint.tensor, 0, checkpoint.config), adapter.module(0)
        sides = {}
        for kind, (W, b, rows) in enumerate(
            zip(
                (weights.W_Q, weights.W_K, weights.W_V),
                (weights.b_Q, weights.b_K, weights.b_V),
                adapter.rows(checkpoint.config),
            )
        ):
            name = at + adapter.projections[kind if len(adapter.projections) == 3 else 0]
            for end, flat in (
                (".weight", W.movedim(-2, 0).flatten(1)),
                (".bias", b if b is None else b.reshape(1, -1)),
            ):
                if flat is not None:
                    whole = sides.setdefault(name + end, {})
                    whole.update(zip(rows.flatten().tolist(), flat.T))
        for name, columns in sides.items():
            stored = checkpoint.tensor(name)
            stored = (
                stored
                if stored.dim() == 2 and adapter.transposed
                else stored.T
                if stored.dim() == 2
                else stored.unsqueeze(0)
            )
            assert torch.equal(
                torch.stack([columns[i] for i in range(len(columns))], dim=1), stored
            )
        assert {name for name in checkpoint.tensors if name.startswith(at)} >= set(sides)

    def test_full_rank_is_exact(self, family, tiny, converted):
        g, whole = geometry(tiny(family)), None
        for attention in [None, "eager"]:
            ours = load(
                converted(family, rank=g.head_dim, force=True, **QUICK),
                attn_implementation=attention,
            )
            # transformers' Falcon adds ALiBi twice in eager attention, once in sdpa, as it was
            # trained
            whole = (
                whole
                if family == "falcon" and whole is not None
                else logits(load(tiny(family), attn_implementation=attention), prompt())
            )
            assert relative(logits(ours, prompt()), whole) < FLOAT32

    def test_full_rank_is_exact_in_float64(self, family, tmp_path, monkeypatch):
        source = build(family, tmp_path / "source", dtype=torch.float64)
        convert(str(source), tmp_path / "out", rank=geometry(source).head_dim, force=True, **QUICK)
        # grouped products know no float64
        models = [
            load(folder, experts_implementation="eager") for folder in (tmp_path / "out", source)
        ]
        # families round norms, tables and scores to float32, which would hide the algebra
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        assert relative(*(logits(model, prompt()) for model in models)) < FLOAT64

    def test_the_error_of_the_fit_is_that_of_the_weights(self, family, tiny, converted):
        """At rank 7 the keys that the written factors stand for miss the original's by what the fit
        says, and the record says it too.
        """
        folder = converted(family, metric="plain", refit=False, **QUICK)
        study = Study(str(tiny(family)))
        checkpoint, adapter = study.checkpoint, study.family.any
        layer = load(folder).get_submodule(adapter.layer_path)[1]
        W = adapter.split(checkpoint.tensor, 1, checkpoint.config).W_K.double()
        missed = (
            (layer.get_submodule(adapter.attention).keys.matrices() - W).norm() / W.norm()
        ).item()
        recorded = json.loads((folder / "lrkv.json").read_text())["attention"]["self"]
        recorded = recorded["layers"][1]["keys"]["error"]
        assert missed == pytest.approx(recorded, rel=1e-3) and 0.01 < missed < 1

    def test_cached_equals_uncached(self, family, converted):
        model, ids = load(converted(family)), prompt(50, batch=2)
        assert relative(step_by_step(model, ids, 30), logits(model, ids, use_cache=False)) < STEPS

    def test_bfloat16_decodes_as_well_as_the_original(self, family, tiny, converted):
        """At full rank, a prefill and then token by token: rounding costs no more than it costs the
        original, but for that of the factors themselves.
        """
        ids, error = prompt(24), {}
        for name, folder in (
            ("original", tiny(family)),
            ("ours", converted(family, rank=geometry(tiny(family)).head_dim, force=True, **QUICK)),
        ):
            exact, rounded = (
                logits(load(folder, dtype=torch.float32), ids),
                step_by_step(load(folder, dtype=torch.bfloat16), ids, 20),
            )
            error[name] = ((rounded.float() - exact).norm() / exact.norm()).item()
        assert error["ours"] < 2.5 * error["original"] < 0.5

    def test_left_padding_changes_nothing(self, family, converted):
        model, ids, pad = load(converted(family)), prompt(40, batch=2), 9
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[1, :pad], padded[1, pad:], mask[1, :pad] = 258, ids[1, :-pad], 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache, pieces = DynamicCache(config=model.config), []
        for start, stop in [(0, 30)] + [(t, t + 1) for t in range(30, 40)]:
            given = {"position_ids": positions[:, start:stop]} if takes_positions(model) else {}
            pieces.append(
                model(
                    padded[:, start:stop],
                    attention_mask=mask[:, :stop],
                    past_key_values=cache,
                    **given,
                ).logits
            )
        out = torch.cat(pieces, dim=1).detach()
        assert relative(out[0], logits(model, ids[:1], use_cache=False)[0]) < STEPS
        assert relative(out[1, pad:], logits(model, ids[1:, :-pad], use_cache=False)[0]) < STEPS

    def test_it_generates_the_same_with_and_without_a_cache(self, family, converted):
        model = load(converted(family))
        greedy = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=258)
        assert torch.equal(
            model.generate(prompt(12), **greedy),
            model.generate(prompt(12), use_cache=False, **greedy),
        )

    def test_allocated_bytes_equal_the_formula(self, family, converted):
        model = load(converted(family))
        by_hand = 4 * sum(
            m + module.num_heads * r
            for module in model.modules()
            if isinstance(module, LowRankHeads)
            for m, r in [(module.base_width, module.rank)]
        )
        assert cache_bytes(model(prompt(10), use_cache=True).past_key_values) == 10 * by_hand
        assert formula_bytes(model.config, 4) == by_hand

    def test_a_training_step_reaches_every_factor(self, family, converted):
        model, ids = load(converted(family)).train(), prompt(30)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        before = model(ids, labels=ids).loss
        before.backward()
        still = [
            name
            for name, p in model.named_parameters()
            if "keys." in name or "values." in name
            if p.grad is None or not p.grad.any()
        ]
        # a bias of keys alone, without rotation, changes no softmax
        assert not [name for name in still if not name.endswith("keys.bias")]
        optimizer.step()
        assert model(ids, labels=ids).loss < before


def geometry(folder):
    return Study(str(folder)).sites[0].geometry


def takes_positions(model) -> bool:
    original = next(
        cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")
    )
    return "position_ids" in inspect.signature(original.forward).parameters


LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM
assert "lrkv_convert" not in sys.modules
ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
out = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    out[folder] = model(ids).logits[0, -1].tolist()
print(json.dumps(out))
"""


@pytest.mark.slow
def test_all_load_in_a_fresh_process_without_this_package(converted, tmp_path):
    folders = {str(converted(family)): family for family in CONFIGS}
    environment = {
        "HF_MODULES_CACHE": str(tmp_path),
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    blocked = "import sys; sys.modules['lrkv_convert'] = None\n" + LOAD.replace(
        'assert "lrkv_convert" not in sys.modules\n', ""
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked, *folders],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, last in json.loads(result.stdout.strip().splitlines()[-1]).items():
        assert relative(torch.tensor(last), logits(load(folder), prompt(40))[0, -1]) < FLOAT32, (
            folders[folder]
        )


@pytest.mark.parametrize("keys", ["full", "per-head", "rotary", "commuting"])
@pytest.mark.parametrize(
    "family",
    ["qwen3", "olmo2", "cohere-norm", "gptj", "gpt_neox", "gemma3_text", "cohere", "falcon-rope"],
)
def test_other_forms_of_keys(family, keys, tiny, tmp_path):
    """Exact where nothing is lost, the same with a cache; a base that is rotated in the cache needs
    RoPE on whole heads and no norm.
    """
    g = geometry(tiny(family))
    whole = {"base_width_k": g.kv_heads * g.head_dim, "rank_k": 0}
    sizes = {"full": {}, "commuting": whole}.get(keys, {"rank_k": 20})
    options = dict(calibration=[], force=True, keys=keys, rank_v=20, **sizes)
    if keys in ("rotary", "commuting") and (g.key_norm or g.rotary_dim < g.head_dim):
        with pytest.raises(LrkvError, match="whole heads and keys without a norm"):
            convert(str(tiny(family)), tmp_path / "out", **options)
        return
    convert(str(tiny(family)), tmp_path / "out", **options)
    model, ids = load(tmp_path / "out"), prompt(40, batch=2)
    whole = logits(model, ids, use_cache=False)
    assert relative(whole, logits(load(tiny(family)), ids)) < FLOAT32
    assert relative(step_by_step(model, ids, 20), whole) < STEPS


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi", "opt", "cohere", "olmo"])
def test_the_kernel_decodes_what_rebuilding_does(family, converted):
    """Interpreted here, in bfloat16: norms of keys, RoPE on parts and on reordered channels, none
    at all. It rounds no more than rebuilding does, measured from the same weights in float32.
    """
    model, ids, seen = load(converted(family), dtype=torch.bfloat16), prompt(24, batch=4), {}
    for path in ("rebuild", "kernel"):
        model.config.lrkv_path, cache = path, DynamicCache(config=model.config)
        model(ids[:, :23], past_key_values=cache)
        seen[path] = logits(model, ids[:, 23:], past_key_values=cache)
    model.config.lrkv_path = "rebuild"
    exact = logits(model.float(), ids)[:, 23:]
    error = {
        path: ((found.float() - exact).norm() / exact.norm()).item() for path, found in seen.items()
    }
    assert error["kernel"] < 1.5 * error["rebuild"] < 0.08, error


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gpu_takes_the_path_the_table_says(family, converted, monkeypatch):
    model, taken = load(converted(family)), []

    def on_a_gpu(asked, **situation):
        taken.append(
            choose_path(
                asked, **situation | {"device": torch.device("cuda"), "dtype": torch.bfloat16}
            )
        )
        return "split"

    monkeypatch.setattr(attention_lrkv, "choose_path", on_a_gpu)
    monkeypatch.setattr(attention_lrkv, "missing_for_kernel", lambda *_: None)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for token in range(2):
            model(prompt(1, seed=token), past_key_values=cache)
    adapter = family_named(model.config.model_type).any
    # ALiBi; what the table says of the norm
    without = family == "falcon" or adapter.key_norm(model.config) and "LayerNorm" in adapter.norms
    assert set(taken) == {
        "kernel" if attention_class(adapter.model_type).kernel and not without else "split"
    }


def test_the_docs_list_the_families():
    text = (Path(__file__).parents[1] / "docs/families.md").read_text()
    table = text.split("<!-- families")[1].split("-->\n")[1].split("<!-- end of families")[0]
    assert table.strip().splitlines() == readme_rows(), (
        "python -m lrkv_convert.families.table docs/families.md writes it anew"
    )
    assert (
        {config().model_type for config in CONFIGS.values()}
        == {name for name, family in KNOWN.items() if family.encoder is None}
        == set(FAMILIES)
    ), "a family needs an entry, a modelling class and a row of the tests"


@pytest.mark.parametrize(
    "mixture",
    [
        "mixtral",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_moe", "qwen3_moe")),
    ],
)
def test_experts_are_left_alone(mixture, tiny, converted):
    ours, theirs = load(converted(mixture)).state_dict(), load(tiny(mixture)).state_dict()
    experts = [name for name in theirs if ".mlp." in name]
    assert len(experts) >= 2 * 3 and all(torch.equal(ours[name], theirs[name]) for name in experts)


def test_a_lost_expert_is_named(tiny, tmp_path):
    source = shutil.copytree(tiny("mixtral"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    gone = next(name for name in tensors if ".experts.2.w3" in name)
    del tensors[gone]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LrkvError, match="lacks the tensor model.layers.0.mlp.experts"):
        convert(str(source), tmp_path / "out", rank=7, calibration=[])


@pytest.mark.parametrize(
    "family, change, says",
    [
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("falcon", {"multi_query": True}, "one KV head"),
        ("gptj", {"rotary_dim": None}, "cannot read the config"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
        ("mpt", {"attn_config": {"alibi": False}}, "no alibi"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ],
)
def test_what_cannot_be_exact_is_refused(family, change, says, tiny, tmp_path):
    source = shutil.copytree(tiny(family), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", says=says)


@pytest.mark.parametrize(
    "options, says", [(["--base", "aligned"], "QK-norm"), (["--metric", "attention"], "QK-norm")]
)
def test_what_a_norm_of_keys_forbids(options, says, tiny, tmp_path):
    refused(tiny("qwen3"), tmp_path / "out", *options, says=says)


def test_without_text_a_norm_of_keys_is_fitted_plainly(tiny, tmp_path):
    assert (
        convert(str(tiny("qwen3")), tmp_path / "out", rank=7, calibration=[]).record.recipe[
            "metric"
        ]
        == "plain"
    )


@pytest.mark.parametrize(
    "family, buffers",
    [
        (
            "gpt_neox",
            {
                "attention.masked_bias": torch.tensor(-1e9).half(),
                "attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
                "attention.rotary_emb.inv_freq": torch.ones(5),
            },
        ),
        ("gptj", {"attn.masked_bias": torch.tensor(-1e9).half()}),
    ],
)
def test_masks_that_old_checkpoints_hold_are_passed_over(family, buffers, tiny, tmp_path):
    """-1e9 is -inf in float16; transformers reads none of them."""
    source, layer = (
        shutil.copytree(tiny(family), tmp_path / "source"),
        family_named(family).any.layer_path,
    )
    tensors = load_file(source / "model.safetensors") | {
        f"{layer}.0.{name}": tensor for name, tensor in buffers.items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(str(source), tmp_path / "out", rank=7, calibration_tokens=1024)
    assert not any(
        name.endswith(tuple(buffers)) for name in load_file(tmp_path / "out" / "model.safetensors")
    )


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon", "gpt_neox"])
def test_healing_turns_every_dropout_off(family, tmp_path):
    config = CONFIGS[family]()
    for name in (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout",
        "layerdrop",
    ):
        if hasattr(config, name):
            setattr(config, name, 0.3)
    model = AutoModelForCausalLM.from_config(config).train()
    assert not torch.equal(model(prompt()).logits, model(prompt()).logits)
    choose_trained(model, family_named(family).sites(config), "all")
    assert torch.equal(model(prompt()).logits, model(prompt()).logits)


def test_frozen_experts_are_held_small_in_healing(converted):
    model, mixtral = load(converted("mixtral")), family_named("mixtral")
    choose_trained(model, mixtral.sites(model.config), "attention")
    set_precision(model, mixtral, torch.bfloat16)
    assert (
        model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        and model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    )


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neo"])
def test_heads_can_be_removed_where_positions_are_added_to_scores(family, tiny, tmp_path):
    (tmp_path / "text.txt").write_text(
        "".join(f"{i} sheep jumped over {i * 7 % 13} fences.\n" for i in range(80))
    )
    run(
        "inspect",
        tiny(family),
        "--ablate",
        "--text",
        tmp_path / "text.txt",
        "--max-tokens",
        512,
        "--calibration-tokens",
        1024,
    )


def test_layers_may_differ(tiny, tmp_path):
    """SmolLM3 leaves RoPE out of some layers: their keys are position-free, may share a wider base,
    are read in place, and a form of keys that needs RoPE is refused.
    """
    study = Study(str(tiny("smollm3")))
    assert [site.geometry.rotary for site in study.sites] == [True, False, True]
    sites = convert(str(tiny("smollm3")), tmp_path / "out", rank=4, calibration=[]).plan.sites
    # a key of 20 + 4 numbers is rebuilt for each of three heads, or read by six queries as it is
    assert sites[0].work - sites[1].work == 3 * 24 * 20 + 6 * 20 - 6 * 24
    with pytest.raises(LrkvError, match="needs RoPE"):
        convert(str(tiny("smollm3")), tmp_path / "rotary", rank=4, keys="rotary")
