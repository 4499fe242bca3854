"""The converted model computes what the original does (at full rank), and generates with the small
cache exactly as without one.
"""

import json

import pytest
import torch
from conftest import CONFIGS, build, prompt, relative
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrkv_convert import convert
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes

FLOAT32 = 1e-4  # logits through a few float32 layers
FLOAT64 = 1e-9  # the same in float64
STEPS = 1e-4  # cached against uncached: the same sums in another order, float32
FULL = dict(rank=20, force=True)


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.slow
@pytest.mark.parametrize("base", ["joint", "aligned", "mean"])
def test_full_rank_is_exact(family, base, tiny, converted):
    ids = prompt()
    assert (
        relative(
            logits(load(converted(family, base=base, **FULL)), ids), logits(load(tiny(family)), ids)
        )
        < FLOAT32
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", ["joint", "aligned"])
@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
def test_full_rank_is_exact_in_float64(family, base, tmp_path, monkeypatch):
    # the library's RMSNorm rounds to float32, which would hide the algebra
    def norm64(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm64)
    source = build(family, tmp_path / "source", dtype=torch.float64)
    convert(str(source), tmp_path / "out", base=base, calibration_tokens=1024, **FULL)
    ids = prompt()
    assert relative(logits(load(tmp_path / "out"), ids), logits(load(source), ids)) < FLOAT64


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        CONFIGS["llama-mha-yarn"]().rope_parameters,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling_variants_are_exact_and_cached(rope, tmp_path):
    config = CONFIGS["llama"]()
    config.rope_parameters, config.max_position_embeddings = {"rope_theta": 10000.0, **rope}, 600
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", calibration=[], **FULL)
    model, ids = load(tmp_path / "out"), prompt(90)
    assert relative(logits(model, ids), logits(load(tmp_path / "source"), ids)) < FLOAT32
    assert relative(step_by_step(model, ids, 60), logits(model, ids, use_cache=False)) < STEPS


def step_by_step(model, ids, first: int, cache=None, **kwargs):
    """Logits of a prefill of `first` tokens and then one token at a time."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    pieces = [
        model(
            ids[:, :first], past_key_values=cache, attention_mask=mask[:, :first], **kwargs
        ).logits
    ]
    for t in range(first, ids.shape[1]):
        pieces.append(
            model(
                ids[:, t : t + 1], past_key_values=cache, attention_mask=mask[:, : t + 1], **kwargs
            ).logits
        )
    return torch.cat(pieces, dim=1).detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"rank_k": 0, "rank_v": 12}, {"rank_k": 12, "rank_v": 0}, {"base": "aligned"}],
    ids=str,
)
def test_cached_equals_uncached(family, options, converted):
    model, ids = load(converted(family, **options)), prompt(50, batch=2)
    whole = logits(model, ids, use_cache=False)
    assert relative(step_by_step(model, ids, 30), whole) < STEPS
    assert relative(step_by_step(model, ids, 1), whole) < STEPS


@pytest.mark.parametrize("first", [1, 30])
def test_static_cache_equals_uncached(family, first, converted):
    model, ids = load(converted(family)), prompt(50, batch=2)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert (
        relative(step_by_step(model, ids, first, cache), logits(model, ids, use_cache=False))
        < STEPS
    )


def test_a_plain_dynamic_cache_works(converted):
    model, ids = load(converted()), prompt(20)
    assert (
        relative(step_by_step(model, ids, 10, DynamicCache()), logits(model, ids, use_cache=False))
        < STEPS
    )


def test_a_cache_of_another_model_is_refused(tiny, converted):
    cache = DynamicCache(config=load(tiny()).config)
    load(tiny())(prompt(5), past_key_values=cache)
    with pytest.raises(ValueError, match="filled by another model"):
        load(converted())(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_given_are_used_without_a_filled_cache(use_cache, tiny, converted):
    """Positions with a gap, as packing makes them, mean what they mean to the original model."""
    ids, gap = prompt(20), torch.cat((torch.arange(10), torch.arange(25, 35))).unsqueeze(0)
    ours, theirs = (
        logits(load(f), ids, position_ids=gap, use_cache=use_cache)
        for f in (converted(**FULL), tiny())
    )
    assert relative(ours, theirs) < FLOAT32
    assert relative(theirs, logits(load(tiny()), ids)) > 1e-3


HIDDEN = {"between": [5], "behind": [18, 19], "before and between": [0, 11], "of one row": [12]}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"keys": "rotary", "rank": 20}, marks=pytest.mark.slow),
        pytest.param(
            {"keys": "commuting", "base_width_k": 60, "rank_k": 0}, marks=pytest.mark.slow
        ),
        {"keys": "full"},
    ],
    ids=str,
)
def test_a_cache_with_gaps_is_not_gone_on_with(hidden, options, tiny, converted):
    """Keys are rotated by their index there: other tokens than the original's would come, so it
    says so. Keys that lie there rotated know their positions.
    """
    model, ids, mask = (
        load(converted(**{**FULL, **options})),
        prompt(20, batch=2),
        torch.ones(2, 20, dtype=torch.long),
    )
    mask[1 if "row" in hidden else slice(None), HIDDEN[hidden]] = 0
    greedy = dict(
        attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=258
    )
    expected = load(tiny()).generate(ids, **greedy)
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), expected)
    if options.get("keys") in ("commuting", "full"):
        assert torch.equal(model.generate(ids, **greedy), expected)
    else:
        with pytest.raises(ValueError, match="not consecutive"):
            model.generate(ids, **greedy)


def test_a_cache_with_gaps_is_not_gone_on_with_when_compiled(converted):
    model, ids, mask = load(converted(**FULL)), prompt(20), torch.ones(1, 20, dtype=torch.long)
    mask[:, 5] = 0
    cache = StaticCache(config=model.config, max_cache_len=40)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="not consecutive"):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        step(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[19]]))


def test_a_static_cache_is_used_again_with_other_padding(tiny, converted):
    model, original = load(converted(**FULL)), load(tiny())
    cache = StaticCache(config=model.config, max_cache_len=40)
    for padding in (0, 3, 1):
        mask = (torch.arange(12) >= padding).long().unsqueeze(0)
        greedy = dict(
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=258,
            disable_compile=True,
        )
        assert torch.equal(
            model.generate(prompt(12), past_key_values=cache, **greedy),
            original.generate(prompt(12), **greedy),
        )
        cache.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_in_all_ways(family, attention, converted):
    """Greedy with either cache and without one gives the same tokens; beams and sampling run; a
    left-padded batch equals its rows.
    """
    model, ids = load(converted(family), attn_implementation=attention), prompt(12)
    greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=258)
    expected = model.generate(ids, use_cache=False, **greedy)
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert torch.equal(
        model.generate(ids, cache_implementation="static", disable_compile=True, **greedy), expected
    )
    beams = dict(greedy, num_beams=3)
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    torch.manual_seed(0)
    assert model.generate(ids, **dict(greedy, do_sample=True)).shape == (1, 24)
    padded = torch.full((2, 15), 258)
    padded[0], padded[1, 3:] = prompt(15, seed=2), ids
    out = model.generate(padded, attention_mask=(padded != 258).long(), **greedy)
    assert torch.equal(out[1, 15:], expected[0, 12:])


def test_eager_equals_sdpa(family, converted):
    ids = prompt(batch=2)
    eager, sdpa = (
        logits(load(converted(family), attn_implementation=a), ids) for a in ("eager", "sdpa")
    )
    assert relative(eager, sdpa) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"rank_k": 3, "rank_v": 11}, {"rank_k": 0, "rank_v": 5}, {"rank_k": 4, "rank_v": 0}],
    ids=str,
)
def test_allocated_bytes_equal_the_formula(family, options, converted):
    model, T = load(converted(family, **options)), 10
    spec = model.config.lrkv
    by_hand = 4 * sum(
        m + 3 * r
        for side in (spec["keys"], spec["values"])
        for m, r in zip(side["base_width"], side["rank"])
    )
    assert cache_bytes(model(prompt(T)).past_key_values) == T * by_hand
    assert formula_bytes(model.config, 4) == by_hand


def test_widths_and_ranks_may_differ_between_sides_and_layers(tiny):
    """The config carries them per layer: any (m, r), m = 0 and r = 0 included."""
    from lrkv_convert.modeling import FAMILIES

    for family in ("llama", "gpt2"):
        source = AutoConfig.from_pretrained(tiny(family)).to_dict()
        source.pop("model_type")
        spec = {
            "keys": {"base_width": [0, 33], "rank": [5, 0], "alignment": True},
            "values": {"base_width": [7, 0], "rank": [0, 3], "alignment": True},
        }
        torch.manual_seed(0)
        model = FAMILIES[family][2](FAMILIES[family][0](**source, lrkv=spec)).eval()
        ids = prompt(20, batch=2)
        cache = DynamicCache(config=model.config)
        assert (
            relative(step_by_step(model, ids, 8, cache), logits(model, ids, use_cache=False))
            < STEPS
        )
        assert cache_bytes(cache) == 4 * 2 * 20 * (3 * 5 + 33 + 7 + 3 * 3)
        greedy = dict(
            max_new_tokens=6, do_sample=False, num_beams=2, eos_token_id=None, pad_token_id=258
        )
        assert torch.equal(
            model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy)
        )


def test_a_gauge_leaves_logits_unchanged(tiny, tmp_path):
    """aligned folds a gauge into W_Q and W_O; without truncation nothing may change, keys under
    RoPE and biases included (float64 algebra).
    """
    from dataclasses import replace

    from lrkv_convert.fit.layer import fit_site
    from lrkv_convert.folder.companions import converted_config
    from lrkv_convert.folder.store import Store
    from lrkv_convert.folder.target import empty_target
    from lrkv_convert.plan.shapes import uniform_plan
    from lrkv_convert.study import Study

    for family in ("llama-bias", "qwen2", "gpt2"):
        study = Study(str(tiny(family)))
        study.build(torch.device("cpu"))
        site, adapter, geometry = study.sites[0], study.family.any, study.sites[0].geometry
        plan = uniform_plan(study.sites, study.layers, 8, rank=20, force=True)
        target = empty_target(
            converted_config(
                study.checkpoint, study.family, {"self": plan}, torch.float64, "aligned"
            )
        )
        layer = study.seen(Store(tmp_path / f"store-{family}", {}), site)
        layer = replace(layer, weights=layer.weights.to(torch.float64))
        _, tensors = fit_site(
            layer,
            layer.metrics("attention"),
            plan.sites[0].keys,
            plan.sites[0].values,
            "aligned",
            target.get_submodule(site.path),
            refit=False,
        )
        q_name = "q_attn.weight" if family == "gpt2" else "q_proj.weight"
        # the gauge is not the trivial one
        assert relative(tensors[q_name], adapter.join(layer.weights)[q_name]) > 0.1
        w, x = layer.weights, torch.randn(1, 5, geometry.width, dtype=torch.float64)
        heads = lambda side: (
            torch.einsum(
                "td,hde->hte",
                x[0],
                tensors[f"{side}.W_shared.weight"].T
                + tensors[f"{side}.U.weight"].T.reshape(geometry.width, 3, 20).transpose(0, 1)
                @ tensors[f"{side}.B"].mT,
            )
            + (tensors[f"{side}.bias"].unsqueeze(1) if w.b_K is not None else 0)
        )
        q = (x[0] @ tensors[q_name] if family == "gpt2" else x[0] @ tensors[q_name].T).view(
            5, 3, -1, 20
        )
        b_q = tensors["q_attn.bias" if family == "gpt2" else "q_proj.bias"].view(3, -1, 20)
        scores = torch.einsum("shge,hte->hgst", q + b_q, heads("keys"))
        plain_q = torch.einsum("sd,hgde->shge", x[0], w.W_Q) + w.b_Q
        plain_k = torch.einsum("td,hde->hte", x[0], w.W_K) + w.b_K.unsqueeze(1)
        assert relative(scores, torch.einsum("shge,hte->hgst", plain_q, plain_k)) < 1e-10
        W_O = (tensors["c_proj.weight"] if family == "gpt2" else tensors["o_proj.weight"].T).view(
            3, -1, 20, geometry.width
        )
        plain_v = torch.einsum("td,hde->hte", x[0], w.W_V) + w.b_V.unsqueeze(1)
        assert (
            relative(
                torch.einsum("hte,hgeD->hgtD", heads("values"), W_O),
                torch.einsum("hte,hgeD->hgtD", plain_v, w.W_O),
            )
            < 1e-10
        )


def test_every_factor_trains(family, converted):
    model, ids = load(converted(family)).train(), prompt(batch=2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.endswith("keys.bias") and family == "gpt2":
            # without positions a key bias shifts all logits of a query alike: its gradient is zero
            continue
        assert parameter.grad.abs().max() > 0, name
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert model(ids, labels=ids).loss < loss


def test_gradient_checkpointing_gives_the_same_gradients(converted):
    grads = []
    for checkpointing in (False, True):
        model = load(converted()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(prompt(), labels=prompt()).loss.backward()
        grads.append(model.model.layers[0].self_attn.keys.U.weight.grad)
    assert relative(*grads) < FLOAT32


def test_a_model_from_config_alone_starts_small(converted):
    """From scratch: finite, |U_h B_h^T| well below the base, as the paper starts (Sec 3)."""
    config = AutoConfig.from_pretrained(converted())
    model = AutoModelForCausalLM.from_config(config)
    keys = model.model.layers[0].self_attn.keys
    residual = keys.U.weight.T.reshape(48, 3, -1).transpose(0, 1) @ keys.B.mT
    assert 0.02 < (residual.norm() / 3**0.5 / keys.W_shared.weight.norm()).item() < 0.5
    assert torch.isfinite(logits(model.eval(), prompt())).all()


def test_saved_again_it_still_loads(converted, tmp_path):
    model, ids = load(converted()), prompt()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "attention_lrkv.py").is_file()
    assert "auto_map" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))
