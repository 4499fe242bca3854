"""The metrics are what their definitions say, and calibration feeds them what the original model
computes.
"""

import pytest
import torch
from conftest import prompt, relative
from families import ROPE
from transformers import AutoModelForCausalLM, LlamaConfig

from lrkv_convert.examples.example import windows_of
from lrkv_convert.families import AttentionWeights, Geometry
from lrkv_convert.fit import metric as metrics
from lrkv_convert.fit.metric import (
    FLOOR,
    HeadMoments,
    LayerMetrics,
    rotation_average,
    shrunk,
    square_root,
)
from lrkv_convert.folder.store import Store
from lrkv_convert.observe.calibrate import calibrate
from lrkv_convert.study import Study

FLOAT32 = 1e-5  # sums are float32 products
BFLOAT16 = 2**-8  # activations are kept in bfloat16


def test_square_root_squares_back_and_inverts():
    X = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = X.T @ X
    root = square_root(sigma)
    assert torch.allclose(root.root @ root.root, sigma, rtol=1e-12)
    assert torch.allclose(root.root @ root.inverse, torch.eye(12, dtype=torch.float64), atol=1e-10)


def test_zero_energy_directions_do_not_blow_up():
    root = square_root(torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    assert root.inverse.abs().max() <= (4 * FLOOR) ** -0.5 * (1 + 1e-12)


def test_shrinkage_adds_a_share_of_the_mean_eigenvalue():
    assert torch.allclose(
        shrunk(torch.diag(torch.tensor([1.0, 3.0])), 0.5), torch.diag(torch.tensor([2.0, 4.0]))
    )


def test_rotation_average_is_the_mean_over_angles():
    M = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # a product of two rotations is averaged exactly by 3 or more equal steps
    M, mean, steps = M @ M.mT, 0, 8
    for a in range(steps):
        for b in range(steps):
            angle = 2 * torch.pi * torch.tensor([a, b], dtype=torch.float64) / steps
            c, s = torch.diag(angle.cos()), torch.diag(angle.sin())
            R = torch.cat((torch.cat((c, s), 1), torch.cat((-s, c), 1)))
            mean = mean + R.T @ M @ R / steps**2
    assert torch.allclose(rotation_average(M, M.shape[-1]), mean, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_calibration_sums_follow_their_definitions(family, tiny, tmp_path):
    """Layer by layer on the skeleton = straight from the original model's hidden states and
    attention weights.
    """
    study, tokens, store = Study(str(tiny(family))), prompt(24, batch=2), Store(tmp_path / "a", {})
    skeleton, sites = study.build(torch.device("cpu")), study.sites
    adapter, geometry = sites[0].adapter, sites[0].geometry
    wanted = {"fisher", "attention", "whitened"}
    calibrate(skeleton, sites, windows_of(tokens), wanted, store)
    layers = [study.seen(store, site) for site in sites]
    seen = [layer.sums for layer in layers]
    model = AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval()
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(seen) == study.layers
    for i, sums in enumerate(seen):
        norm = model.get_submodule(adapter.layer_path)[i].get_submodule(
            "ln_1" if family == "gpt2" else "input_layernorm"
        )
        x = norm(out.hidden_states[i]).double()  # (N, T, D)
        assert relative(torch.cat(layers[i].inputs), x) < BFLOAT16
        # (N, H G, T, T)
        a = out.attentions[i].double()
        z = torch.einsum("nhst,ntd->nhsd", a, x)
        keys, values = (
            torch.einsum("nhst,ntd,nte->de", a, x, x),
            torch.einsum("nhsd,nhse->de", z, z),
        )
        assert relative(sums["keys"], keys) < FLOAT32 and relative(sums["values"], values) < FLOAT32
        assert relative(sums["inputs"], torch.einsum("ntd,nte->de", x, x)) < FLOAT32
        # (N, H, G, T, k)
        z = (z @ metrics.head_basis(layers[i].weights.W_V)).unflatten(
            1, (geometry.kv_heads, geometry.groups)
        )
        assert relative(sums["heads"], torch.einsum("nhgsa,nhgsb->hab", z, z)) < FLOAT32
        q = torch.einsum("ntD,hgDd->nhgtd", x, layers[i].weights.W_Q.double())
        if layers[i].weights.b_Q is not None:
            q = q + layers[i].weights.b_Q.unsqueeze(2)
        assert relative(sums["queries"], torch.einsum("nhgtd,nhgte->hde", q, q)) < FLOAT32
        assert sums["tokens"] == tokens.numel()


def test_the_mean_over_heads_is_the_sigma_they_would_share(tiny, tmp_path):
    """Also where runs of heads share one: Q^T Sigma_V Q is the mean of what each head has,
    shrinkage included.
    """
    shape = dict(num_attention_heads=9, num_key_value_heads=9, head_dim=4, hidden_size=54)
    nine = LlamaConfig(**{**ROPE, **shape})
    AutoModelForCausalLM.from_config(nine).save_pretrained(tmp_path / "nine")
    examples = windows_of(prompt(24, batch=2))
    # a run for each of three heads; of nine, two share one
    for folder, heads, count in ((tiny("llama"), 3, 3), (tmp_path / "nine", 9, metrics.RUNS)):
        study, store = Study(str(folder)), Store(tmp_path / f"of-{heads}", {})
        skeleton, sites = study.build(torch.device("cpu")), study.sites
        calibrate(skeleton, sites, examples, {"attention", "whitened"}, store)
        layer = study.seen(store, sites[1])
        metric, basis = (
            layer.metrics("attention").values,
            metrics.head_basis(layer.weights.W_V),
        )
        sizes = torch.tensor(
            [run.stop - run.start for run in metrics.runs(heads, count)], dtype=torch.float64
        )
        assert metric.grams.shape[0] == count
        assert (
            relative(
                torch.einsum("r,rab->ab", sizes / heads, metric.grams),
                basis.T @ metric.sigma @ basis,
            )
            < FLOAT32
        )
    assert (
        layer.metrics("whitened").values.grams is None
        and layer.metrics("attention").keys.grams is None
    )


def test_a_dead_head_counts_for_next_to_nothing():
    """Zero moments among tiny ones (gradients squared) must not weigh like the identity."""
    weights = AttentionWeights(*(torch.zeros(()) for _ in range(4)))
    moments = torch.stack([torch.zeros(4, 4), 1e-6 * torch.eye(4)]).double()
    found = LayerMetrics(
        weights, Geometry(8, 2, 1, 4, 4), "fisher", None, HeadMoments(moments, moments)
    )
    for M in (found.keys.M, found.values.M):
        assert M.root[0].norm() < 1e-3 * M.root[1].norm() and torch.isfinite(M.inverse).all()
