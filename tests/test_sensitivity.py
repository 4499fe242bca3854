"""Gradients taken layer by layer on the skeleton are those of the whole model, and their metric
predicts the loss to second order.
"""

import pytest
import torch
from conftest import prompt, relative
from families import ROPE
from transformers import AutoModelForCausalLM, LlamaConfig

from lrkv_convert.examples.example import windows_of
from lrkv_convert.folder.store import Store
from lrkv_convert.observe import sensitivity
from lrkv_convert.observe.calibrate import calibrate
from lrkv_convert.observe.sensitivity import SEED, draw, head_moments
from lrkv_convert.study import Study

FLOAT32 = 1e-4  # gradients through a few float32 layers


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "gpt2"])
def test_moments_equal_those_of_the_whole_model(family, tiny, tmp_path):
    study, tokens, store = Study(str(tiny(family))), prompt(24, batch=2), Store(tmp_path / "a", {})
    skeleton, sites, examples = study.build(torch.device("cpu")), study.sites, windows_of(tokens)
    adapter, g = sites[0].adapter, sites[0].geometry
    calibrate(skeleton, sites, examples, {"fisher"}, store, keep=[0, 1])
    head_moments(skeleton, sites, examples, [0, 1], store)
    found = [study.seen(store, site).moments for site in sites]

    model, generator = (
        AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval(),
        torch.Generator().manual_seed(SEED),
    )
    seen = {}
    for i, layer in enumerate(model.get_submodule(adapter.layer_path)):
        attention = layer.get_submodule(adapter.attention)
        attention.get_submodule(adapter.key_projection).register_forward_hook(
            lambda m, a, out, i=i: seen.update({("keys", i): out})
        )
        attention.get_submodule(adapter.output).register_forward_pre_hook(
            lambda m, a, i=i: seen.update({("values", i): a[0]})
        )
    sums = {}
    for row in tokens:
        logits = model(row.unsqueeze(0)).logits[0]
        drawn = draw(logits.detach().softmax(-1), generator).squeeze(1)
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        for place, gradient in zip(seen, torch.autograd.grad(loss, list(seen.values()))):
            gradient = (
                adapter.keys(gradient[0], study.config).flatten(1)
                if place[0] == "keys"
                else gradient[0]
            )
            # (T, H, 1 or G, d)
            heads = gradient.view(24, g.kv_heads, -1, g.head_dim).double()
            sums[place] = sums.get(place, 0) + torch.einsum("thgd,thge->hde", heads, heads)
    for i, moments in enumerate(found):
        assert relative(moments.keys, sums["keys", i] / tokens.numel()) < FLOAT32
        assert relative(moments.values, sums["values", i] / tokens.numel()) < FLOAT32


def test_moments_in_bfloat16_are_those_in_float32(tmp_path, monkeypatch):
    """As wide models on hardware that multiplies bfloat16 faster have them: the same up to its
    rounding, and kept in float64.
    """
    torch.manual_seed(0)
    shape = dict(hidden_size=sensitivity.BF16_FROM, num_attention_heads=8, num_key_value_heads=4)
    wide = LlamaConfig(**{**ROPE, **shape, "initializer_range": 0.1})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    study, examples, found = Study(str(tmp_path / "wide")), windows_of(prompt(24, batch=4)), []
    skeleton, sites = study.build(torch.device("cpu")), study.sites
    for fast, name in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(sensitivity, "fast_bf16", lambda device: fast)
        # rounded logits may draw others
        monkeypatch.setattr(
            sensitivity, "draw", lambda p, generator: torch.arange(len(p)).unsqueeze(1)
        )
        store = Store(tmp_path / name, {})
        calibrate(skeleton, sites, examples, {"fisher"}, store, range(4))
        head_moments(skeleton, sites, examples, range(4), store)
        found.append(study.seen(store, sites[0]).moments)
    for side in ("keys", "values"):
        exact, rounded = (getattr(moments, side) for moments in found)
        assert rounded.dtype == torch.float64 and not torch.equal(exact, rounded)
        assert ((exact - rounded).norm() / exact.norm()).item() < 0.05


def test_gradients_of_narrow_models_are_taken_in_float32(monkeypatch):
    monkeypatch.setattr(sensitivity, "fast_bf16", lambda device: True)
    for width, rounded in ((sensitivity.BF16_FROM - 1, False), (sensitivity.BF16_FROM, True)):
        with sensitivity.products(torch.zeros(1, width)):
            assert torch.is_autocast_enabled("cpu") == rounded


def test_tokens_are_drawn_by_their_probabilities():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    found = (
        draw(p.expand(20000, -1), torch.Generator().manual_seed(0)).flatten().bincount(minlength=4)
        / 20000
    )
    assert found[1] == 0 and (found - p).abs().max() < 0.02  # five standard deviations


@pytest.mark.slow
def test_the_fisher_metric_fits_closer_than_attention_alone(tiny, converted):
    """On the same rank and text: the gradients are worth their cost."""
    ids = torch.cat([prompt(200, seed=s) for s in (5, 6, 7)])
    original = torch.log_softmax(AutoModelForCausalLM.from_pretrained(tiny("gpt2"))(ids).logits, -1)
    kls = {}
    for metric in ("fisher", "attention", "plain"):
        logp = torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(
                converted("gpt2", metric=metric, calibration_tokens=8192)
            )(ids).logits,
            -1,
        )
        kls[metric] = (original.exp() * (original - logp)).sum(-1).mean().item()
    assert kls["fisher"] < kls["attention"] < kls["plain"], kls
