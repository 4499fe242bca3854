"""A look at a model: spectra are those of the explicit products, errors those of the conversion,
diversity has the bounds of its definition, and what is said of a converted model is what running
both models shows.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import prompt, relative
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert.examples.example import windows_of
from lrkv_convert.examples.text import BUILT_IN, read_texts, windows
from lrkv_convert.families import FAMILIES, Geometry, Site
from lrkv_convert.fit.bases import joint
from lrkv_convert.fit.metric import Metric, square_root
from lrkv_convert.folder.store import Store
from lrkv_convert.inspection import inspect
from lrkv_convert.inspection.ahead import checked_ranks, planned_kl
from lrkv_convert.inspection.diversity import diversity, gram, inner_products, similarity
from lrkv_convert.inspection.fidelity import PROBE, fidelity
from lrkv_convert.inspection.spectra import spectrum
from lrkv_convert.plan.curves import KEY_WEIGHT, curve, second_order
from lrkv_convert.study import Study

EXACT = 1e-9  # float64 algebra
FLOAT32 = 1e-4  # through float32 attention
CPU = torch.device("cpu")


def random_metric(D: int, H: int, d: int, seed: int = 0) -> Metric:
    draw = torch.Generator().manual_seed(seed)
    positive = lambda *shape: (lambda X: X @ X.mT)(
        torch.randn(*shape, generator=draw, dtype=torch.float64)
    )
    return Metric(positive(D, 3 * D), square_root(positive(H, d, 3 * d)))


def weights_of(folder, layer: int = 0):
    study = Study(str(folder))
    site = study.sites[layer]
    return site.adapter.split(study.checkpoint.tensor, layer, study.config).to(torch.float64)


def self_attention(*given, **options) -> dict:
    """What `inspect` says of self-attention."""
    return inspect(*given, **options)["attention"]["self"]


def circuits(W_Q: torch.Tensor, W_K: torch.Tensor) -> torch.Tensor:
    """A_h = W_Q,h W_K,h^T of every query head, explicitly: (n, D, D)."""
    return torch.einsum("hgDe,hFe->hgDF", W_Q, W_K).flatten(0, 1)


# ------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("family", ["llama", "llama-mha-yarn", "gpt2"])
def test_spectra_are_the_singular_values_of_the_explicit_product(family, tiny):
    W = weights_of(tiny(family)).W_K
    H, D, d = W.shape
    metric, found = random_metric(D, H, d), None
    found = spectrum(W, metric, [0, 5])
    A = square_root(metric.sigma).root @ W @ metric.M.root  # (H, D, d)
    assert relative(found.singular, torch.linalg.svdvals(A)) < EXACT
    # the leading d directions of all heads
    left = torch.linalg.svd(torch.cat(list(A), dim=1)).U[:, :d]
    outside = 1 - (left.T @ A).square().sum((1, 2)) / A.square().sum((1, 2))
    assert relative(found.outside, outside) < EXACT
    assert found.base_share == pytest.approx(
        1 - (outside * A.square().sum((1, 2))).sum().item() / A.square().sum().item()
    )
    # rank 0 is the base alone
    assert found.error(0) == pytest.approx((1 - found.base_share) ** 0.5)
    assert found.predicted_kl(5) == pytest.approx(found.error(5) ** 2 * A.square().sum().item() / 2)


def test_dimensions_hold_the_share_that_they_say(tiny):
    W = weights_of(tiny()).W_V
    found = spectrum(W, random_metric(W.shape[1], len(W), W.shape[2]), [0])
    for share in (0.5, 0.9, 0.99, 1.0):
        for energy, count in zip(found.singular.square(), found.dimensions(share).tolist()):
            assert energy[:count].sum() >= share * energy.sum() * (1 - EXACT) and (
                count == 1 or energy[: count - 1].sum() < share * energy.sum()
            )


def test_a_dead_head_has_no_energy_and_needs_no_dimension(tiny):
    W = weights_of(tiny()).W_V.clone()
    W[1] = 0
    found = spectrum(W, random_metric(W.shape[1], len(W), W.shape[2]), [0, 3])
    assert found.energies[1] == 0 and found.dimensions(0.99)[1] == 0 and found.outside[1] == 0
    assert torch.isfinite(found.outside).all()


def test_errors_of_keys_are_those_that_the_conversion_reports_and_of_values_no_less(
    family, tiny, converted
):
    record = json.loads((converted(family) / "lrkv.json").read_text())["attention"]["self"]
    found = self_attention(str(tiny(family)), ranks=[7], calibration_tokens=1024)
    for layer, row in zip(record["layers"], found["layers"]):
        assert row["keys"]["errors"]["7"] == pytest.approx(layer["keys"]["error"], rel=1e-4)
        # the conversion goes on, head by head
        assert (
            0.5 * row["values"]["errors"]["7"]
            < layer["values"]["error"]
            < row["values"]["errors"]["7"]
        )
    assert found["ranks"][0]["cache_ratio"] == pytest.approx(record["cache"]["kv_ratio"])


@pytest.mark.slow
def test_errors_of_values_are_those_of_a_fit_with_one_sigma(family, tiny, converted, tmp_path):
    """Of the shapes of the conversion, in its metric, but with one Sigma for all heads."""
    found = self_attention(str(tiny(family)), ranks=[7], calibration_tokens=1024)
    record = json.loads((converted(family) / "lrkv.json").read_text())["attention"]["self"]
    study, store = Study(str(tiny(family))), Store(tmp_path / "store", {})
    study.build(CPU)
    study.gather(None, 1024)
    study.read()
    study.observe({"fisher"}, store, for_refit=False)
    for site, layer, row in zip(study.sites, record["layers"], found["layers"], strict=True):
        seen = study.seen(store, site)
        own = seen.metrics("fisher").values
        assert own.grams is not None
        m, r = (layer["values"][name] for name in ("base_width", "rank"))
        fit = joint(seen.weights.W_V, replace(own, grams=None), m, r)
        assert row["values"]["errors"]["7"] == pytest.approx(fit.error, rel=1e-4)


@pytest.mark.slow
def test_errors_fall_with_rank_and_full_rank_has_none(tiny, family):
    found = self_attention(str(tiny(family)), ranks=[0, 4, 12, 20], calibration_tokens=512)
    for row in found["layers"]:
        for side in ("keys", "values"):
            errors = list(row[side]["errors"].values())
            assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[0]
    assert found["ranks"][-1]["predicted_kl"] < 1e-9
    assert found["ranks"][-1]["cache_ratio"] > 1 and found["ranks"][-1]["planned_kl"] is None


@pytest.mark.slow
def test_predicted_kl_is_that_of_the_conversion(tiny, converted):
    """The Fisher metric is the divergence to second order: where it is small, the prediction
    holds.
    """
    found = self_attention(str(tiny("gpt2")), ranks=[12], calibration_tokens=8192)["ranks"][0][
        "predicted_kl"
    ]
    ids = windows(read_texts([BUILT_IN]), AutoTokenizer.from_pretrained(tiny("gpt2")), 512, 8192)[
        ::3
    ]
    logp = [
        torch.log_softmax(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, -1)
        for folder in (
            tiny("gpt2"),
            converted("gpt2", rank=12, refit=False, calibration_tokens=8192),
        )
    ]
    assert found / 3 < (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean().item() < 3 * found


# ----------------------------------------------------------------------------------- recommendation


def test_the_plan_is_predicted_by_the_errors_of_its_shapes(tiny):
    W = weights_of(tiny()).W_V
    H, D, d = W.shape
    geometry, metric = Geometry(D, H, 2, d, d), random_metric(D, H, d)
    sites = [Site(0, "self", "", FAMILIES["llama"].any, geometry)]
    sides = curve(W, metric, geometry, d, KEY_WEIGHT), curve(W, metric, geometry, 2 * d, 1.0)
    floor = min(p.size for p in sides[0]) + min(p.size for p in sides[1])
    cheapest = planned_kl([sides], sites, 1, 4, floor / (2 * H * d))
    A = square_root(metric.sigma).root @ W @ metric.M.root
    # both sides begin with a base 16 wide
    beyond = torch.linalg.svdvals(torch.cat(list(A), dim=1))[16:].square().sum().item() / 2
    assert cheapest == pytest.approx(2 * beyond, rel=1e-6)
    assert planned_kl([sides], sites, 1, 4, floor / (2 * H * d) - 0.01) is None
    assert next(second_order(p.loss, KEY_WEIGHT) for p in sides[0]) == pytest.approx(
        beyond, rel=1e-6
    )


@pytest.mark.slow
def test_nothing_is_recommended_that_saves_nothing(tiny):
    ranks = [0, 6, 13, 14, 20]  # break-even lies between 13 and 14
    generous = self_attention(str(tiny()), ranks=ranks, calibration_tokens=512, target_kl=1e9)[
        "recommended"
    ]
    assert generous["rank"] == 0 and 0 < generous["cache_ratio"] < 1
    strict = self_attention(str(tiny()), ranks=ranks, calibration_tokens=512, target_kl=0)[
        "recommended"
    ]
    assert strict["rank"] is None and strict["cache_ratio"] is None
    found = self_attention(str(tiny()), ranks=ranks, calibration_tokens=512)
    target = [row["predicted_kl"] for row in found["ranks"]][1]
    again = self_attention(str(tiny()), ranks=ranks, calibration_tokens=512, target_kl=target)
    assert again["recommended"]["rank"] == 6
    for row in again["layers"]:
        for side in ("keys", "values"):
            assert row[side]["rank"] in (None, 0, 6, 13)
            if row[side]["rank"] is not None:
                assert row[side]["predicted_kl"][str(row[side]["rank"])] <= target / 4


@pytest.mark.parametrize("H, d", [(3, 64), (8, 32), (32, 128), (2, 20), (8, 128)])
def test_default_ranks_are_few_and_save_something(H, d):
    ranks = checked_ranks(None, Geometry(576, H, 1, d, d))
    assert ranks[0] == 0 and len(ranks) <= 11 and all(d + H * r < H * d for r in ranks)


# ---------------------------------------------------------------------------------------- diversity


@pytest.mark.parametrize("family", ["llama", "llama-mha-yarn", "gpt2"])
def test_inner_products_are_those_of_the_explicit_circuits(family, tiny):
    one, other = (weights_of(tiny(family), layer) for layer in (0, 1))
    A, B = (circuits(w.W_Q, w.W_K).flatten(1) for w in (one, other))
    assert relative(inner_products(one.W_Q, one.W_K, other.W_Q, other.W_K), A @ B.T) < EXACT
    unit = A / A.norm(dim=1, keepdim=True)
    assert relative(gram(one.W_Q, one.W_K), unit @ unit.T) < EXACT
    assert (
        relative(
            similarity(one.W_Q, one.W_K, other.W_Q, other.W_K), (unit * B).sum(1) / B.norm(dim=1)
        )
        < EXACT
    )


def test_equal_heads_have_the_least_diversity_and_orthogonal_ones_the_most():
    n, D, d = 6, 48, 8
    W = torch.randn(1, 1, D, d, dtype=torch.float64)
    equal = gram(W.expand(n, 1, D, d), W[0].expand(n, D, d))
    assert diversity(equal) == pytest.approx(1 / n) and diversity(equal, centred=True) == 0
    # (n, D, d): heads on channels of their own
    apart = torch.eye(D, dtype=torch.float64).view(D, n, d).transpose(0, 1)
    assert diversity(gram(apart.unsqueeze(1), apart)) == pytest.approx(1)
    assert diversity(gram(apart.unsqueeze(1), apart), centred=True) == pytest.approx((n - 1) / n)
    scaled = apart * torch.arange(1.0, n + 1).view(n, 1, 1)
    # the sizes of heads do not count
    assert diversity(gram(scaled.unsqueeze(1), apart)) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_diversity_does_not_see_a_gauge(family, tiny):
    w = weights_of(tiny(family))
    M = torch.randn(
        len(w.W_K),
        *w.W_K.shape[-1:] * 2,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    turned = torch.einsum("hgDe,hef->hgDf", w.W_Q, M), w.W_K @ torch.linalg.inv(M).mT
    assert relative(gram(*turned), gram(w.W_Q, w.W_K)) < 1e-8
    assert (
        relative(similarity(w.W_Q, w.W_K, *turned), torch.ones(6 if family == "llama" else 3))
        < 1e-8
    )


def test_query_heads_of_a_group_share_keys_and_count_as_heads(tiny):
    found = self_attention(str(tiny()), ranks=[5], calibration_tokens=512)["diversity"]
    assert (
        found["heads"] == 6
        and found["ceiling_centred"] == 5 / 6
        and 1 / 6 < found["plain"] <= 1
        and found["centred"] <= 5 / 6 + EXACT
    )


# ----------------------------------------------------------------------------------------- fidelity


def faithful(original: Path, folder: Path, tokens: torch.Tensor):
    study = Study(str(original))
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = fidelity(study.build(CPU), study.sites, converted, windows_of(tokens))
    return [found[site] for site in study.sites]


@pytest.mark.slow
def test_a_conversion_of_full_rank_keeps_everything(family, tiny, converted):
    found = self_attention(str(converted(family, rank=20, force=True)), max_tokens=64)
    assert found["similarity"] == pytest.approx(1, abs=1e-6) and found["logit_error"] < FLOAT32
    assert abs(found["attention_kl"]) < 1e-7 and found["output_error"] < FLOAT32
    assert (
        found["diversity"]["kept"]["plain"]
        == pytest.approx(1, abs=1e-5)
        == found["diversity"]["kept"]["centred"]
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_errors_are_those_of_both_models_run_whole(family, layer, tiny, converted):
    """With the original's attention in all layers before, both whole models see the same in this
    one.
    """
    tokens, folder = prompt(40, batch=2), converted(family)
    found = faithful(tiny(family), folder, tokens)[layer]
    one, other = (
        AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager").eval()
        for f in (tiny(family), folder)
    )
    adapter = Study(str(tiny(family))).family.any
    layers = [model.get_submodule(adapter.layer_path) for model in (one, other)]
    for i in range(layer):
        setattr(
            layers[1][i],
            adapter.attention,
            copy.deepcopy(layers[0][i].get_submodule(adapter.attention)),
        )
    outputs = []
    for mine in layers:
        mine[layer].get_submodule(adapter.attention).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
    with torch.no_grad():
        for model in (one, other):
            model(tokens, use_cache=False)
    a, b = (weights.double() for _, weights in outputs)  # (N, n, T, T)
    # masks, sliding windows included
    assert torch.equal(a > 0, b > 0)
    seen = a > 0
    logs = [torch.where(seen, w.log(), 0.0) for w in (a, b)]
    kl = (a * (logs[0] - logs[1])).sum(-1).mean((0, 2))
    assert relative(found.kl, kl) < 1e-3 and kl.min() > 1e-6
    centred = [
        torch.where(seen, w - w.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True), 0.0)
        for w in logs
    ]
    error = (
        (centred[0] - centred[1]).square().sum((0, 2, 3)) / centred[0].square().sum((0, 2, 3))
    ).sqrt()
    assert relative(found.logit_error, error) < 1e-3
    assert found.output_error == pytest.approx(
        ((outputs[0][0] - outputs[1][0]).norm() / outputs[0][0].norm()).item(), rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "aligned"},
        {"keys": "rotary", "rank": 5},
        {"keys": "per-head", "rank": 9},
        {"keys": "commuting", "rank": 5},
        {"keys": "full", "rank": None, "rank_v": 5},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "joint",
)
def test_similarity_is_that_of_the_explicit_circuits_in_every_form(options, tiny, converted):
    folder, w = converted(**{"rank": 7, **options}), weights_of(tiny())
    model = AutoModelForCausalLM.from_pretrained(folder)
    module, D = model.model.layers[0].self_attn, 48
    with torch.no_grad():
        # what each input channel becomes
        queries = module.q_proj(torch.eye(D)).view(D, 3, 2, 20).permute(1, 2, 0, 3).double()
        # positions all zero
        still = (torch.ones(1, D, 20), torch.zeros(1, D, 20))
        # (H, D, d)
        keys = module.keys.rebuild(module.keys.encode(torch.eye(D).unsqueeze(0), still), still)[
            0
        ].double()
    assert relative(module.keys.matrices(), keys) < FLOAT32
    A, B = circuits(w.W_Q, w.W_K).flatten(1), circuits(queries, keys).flatten(1)
    found = faithful(tiny(), folder, prompt(24))[0]
    assert relative(found.similarity.float(), torch.cosine_similarity(A, B).float()) < FLOAT32
    if options.get("keys") == "full":
        assert (
            found.similarity.min() > 1 - 1e-6
            and found.logit_error.max() < FLOAT32
            and found.output_error > 0.01
        )


def test_biases_enter_the_logit_error_but_not_the_similarity(tiny, converted, tmp_path):
    """Under RoPE a bias of the keys changes what is attended to; W_Q W_K^T knows nothing of it."""
    exact = faithful(tiny("llama-bias"), converted("llama-bias", rank=20, force=True), prompt(30))
    folder = Path(
        shutil.copytree(converted("llama-bias", rank=20, force=True), tmp_path / "spoilt")
    )
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.keys.bias"] *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spoilt = faithful(tiny("llama-bias"), folder, prompt(30))
    assert (
        all(layer.logit_error.max() < FLOAT32 for layer in (*exact, spoilt[0]))
        and spoilt[1].logit_error.min() > 0.01
    )
    assert torch.equal(spoilt[1].similarity, exact[1].similarity)


def test_the_probe_attends_as_eager_does(family, tiny):
    ids = prompt(60)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation=name)
            .eval()(ids)
            .logits
            for name in ("eager", PROBE)
        ]
    assert relative(logits[1], logits[0]) < FLOAT32
