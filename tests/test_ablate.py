"""Heads are removed as if their rows of W_O were zero, and predictors are ranked against what that
did.
"""

import json

import numpy
import pytest
import torch
from conftest import prompt, run
from transformers import AutoModelForCausalLM

from lrkv_convert.examples.example import windows_of
from lrkv_convert.inspection import inspect
from lrkv_convert.inspection.ablate import (
    Effect,
    WholeModel,
    ablate,
    correlation,
    predictors,
    within_layers,
)
from lrkv_convert.inspection.diversity import diversity
from lrkv_convert.inspection.spectra import LayerLook, Spectrum
from lrkv_convert.study import Study

CPU = torch.device("cpu")
TEXT = (
    "What a head is worth is told by what is lost without it, and seldom by how unlike the others"
    " it looks. " * 12
)


def plainly(folder, removed, ids: torch.Tensor) -> tuple[float, float]:
    """Loss, and KL from the whole model, with rows of W_O zeroed in the model as transformers loads
    it.
    """
    study, logps = Study(str(folder)), []
    adapter, g = study.family.any, study.sites[0].geometry
    for heads in ([], removed):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for layer, head in heads:
            projection = model.get_submodule(
                f"{adapter.layer_path}.{layer}.{adapter.attention}.{adapter.output}"
            ).weight
            rows = slice(head * g.groups * g.head_dim, (head + 1) * g.groups * g.head_dim)
            with torch.no_grad():  # Conv1D keeps (in, out), Linear (out, in)
                (
                    projection[rows] if study.config.model_type == "gpt2" else projection[:, rows]
                ).zero_()
        logps.append(model(ids, use_cache=False).logits[:, :-1].log_softmax(-1))
    loss = -logps[1].gather(2, ids[:, 1:, None]).mean().item()
    return loss, (logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean().item()


def opened(folder):
    study = Study(str(folder))
    return study.build(CPU), study.sites


def test_removing_heads_is_zeroing_their_rows_of_the_output_projection(family, tiny):
    ids = prompt(36, batch=2)
    skeleton, sites = opened(tiny(family))
    whole = plainly(tiny(family), [], ids)[0]
    with WholeModel(skeleton, sites, windows_of(ids)) as model:
        assert model.loss == pytest.approx(whole, rel=1e-5)
        units = [(site.layer, h) for site in sites for h in range(site.geometry.kv_heads)]
        for removed in [[unit] for unit in units] + [units[:2], [units[0], units[-1]], units]:
            found, (loss, kl) = model.without("self", removed), plainly(tiny(family), removed, ids)
            assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-6) and kl > 1e-4
            assert found.increase == pytest.approx(loss - whole, abs=1e-4)


def test_nothing_stays_removed(tiny):
    skeleton, sites = opened(tiny())
    with WholeModel(skeleton, sites, windows_of(prompt(20))) as model:
        first = model.without("self", [(0, 1)])
        model.without("self", [(1, 0), (0, 0)])
        assert model.without("self", [(0, 1)]) == first
    assert all(p.is_meta for p in skeleton.layers.parameters())


def layer_look(gram: torch.Tensor, values: list[float]) -> LayerLook:
    sides = Spectrum(
        torch.tensor(values, dtype=torch.float64).sqrt().unsqueeze(1),
        torch.full((len(values),), 0.25, dtype=torch.float64),
        {},
    )
    return LayerLook(sides, sides, gram)


def test_predictors_of_a_head_that_repeats_another_are_lower():
    # three KV heads of two query heads; those of head 2 are those of head 1
    G = torch.eye(6, dtype=torch.float64)
    G[2, 4] = G[4, 2] = G[3, 5] = G[5, 3] = 1
    found = predictors({0: layer_look(G, [2.0, 4.0, 6.0])}, groups=2)
    assert (
        found["distinct"][0, 0]
        == 1
        > found["distinct"][0, 1]
        == found["distinct"][0, 2]
        == pytest.approx(0.75)
    )
    assert (
        found["rank drop"][0, 0] > found["rank drop"][0, 1] == pytest.approx(6 * diversity(G) - 4)
    )
    assert found["energy values"] == pytest.approx({(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0})
    assert found["own values"] == pytest.approx({(0, 0): 0.25, (0, 1): 0.5, (0, 2): 0.75})


def test_the_least_and_the_most_are_removed_together(tiny):
    ids, (skeleton, sites) = prompt(30), opened(tiny())
    values = [[3.0, 1.0, 5.0], [2.0, 6.0, 4.0]]
    looks = [layer_look(torch.eye(6, dtype=torch.float64), v) for v in values]
    found = ablate(skeleton, sites, looks, windows_of(ids))["self"]
    rows = {row["order"]: row for row in found["removals"] if row["predictor"] == "energy values"}
    for order, units in (("least", [(0, 1), (1, 0)]), ("most", [(1, 1), (0, 2)])):
        for count in (1, 2):
            loss, kl = plainly(tiny(), units[:count], ids)
            assert rows[order]["kl"][count - 1] == pytest.approx(kl, rel=1e-3)
            assert rows[order]["loss_increase"][count - 1] == pytest.approx(
                loss - found["loss"], abs=1e-4
            )


def test_correlations_see_order_and_nothing_else():
    units = [(i, h) for i in range(3) for h in range(4)]
    alone = {unit: Effect(increase=float(n), kl=float(n) ** 3) for n, unit in enumerate(units)}
    same = correlation({unit: e.kl + 5 for unit, e in alone.items()}, alone)
    assert (
        same["rho"] == same["rho_kl"] == same["rho_within"] == pytest.approx(1)
        and same["p"] < 1e-6
        and same["p_within"] < 0.01
    )
    assert correlation({unit: -e.increase for unit, e in alone.items()}, alone)[
        "rho"
    ] == pytest.approx(-1)
    depth = correlation({(i, h): -i for i, h in units}, alone)
    # it says nothing inside a layer
    assert depth["rho"] < -0.9 and depth["rho_within"] is None
    assert correlation(dict.fromkeys(units, 1.0), alone)["rho"] is None


def test_within_layers_differences_between_layers_do_not_count():
    layer = numpy.repeat(numpy.arange(4), 3)
    inside = numpy.tile([0.0, 1.0, 2.0], 4)
    assert within_layers(inside - 10 * layer, inside + 10 * layer, layer)[0] == pytest.approx(1)
    noise = numpy.random.default_rng(0).normal(size=12)
    assert within_layers(noise, inside, layer)[1] > 0.05


def test_a_dead_head_is_worth_nothing_and_predicted_to_be(source, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][20:40] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    found = inspect(
        str(source),
        ranks=[5],
        calibration_tokens=512,
        ablate=True,
        text=str(tmp_path / "text.txt"),
        max_tokens=256,
    )["attention"]["self"]["ablation"]
    dead = next(u for u in found["units"] if (u["layer"], u["head"]) == (0, 1))
    assert dead["loss_increase"] == 0 == dead["kl"] and dead["predictors"]["energy values"] == 0
    by_energy = next(
        r for r in found["removals"] if r["predictor"] == "energy values" and r["order"] == "least"
    )
    assert by_energy["loss_increase"][0] == 0


def test_ablation_from_the_command_line(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shown = run(
        "inspect",
        tiny(),
        "--ranks",
        5,
        "--calibration-tokens",
        512,
        "--ablate",
        "--text",
        tmp_path / "text.txt",
        "--max-tokens",
        256,
        "--out",
        tmp_path / "look",
    ).stdout
    found = json.loads((tmp_path / "look" / "inspect.json").read_text())
    found = found["attention"]["self"]["ablation"]
    assert (
        len(found["units"]) == 6
        and found["removals"][0]["heads"] == [1, 2]
        and found["tokens"] == 256
    )
    for row in found["removals"]:
        assert len(row["loss_increase"]) == len(row["kl"]) == 2
    assert (
        "least energy values" in shown
        and "rho" in shown
        and max(
            map(len, (x for x in shown.splitlines() if not x.startswith(("next: ", "written: "))))
        )
        <= 100
    )
    alone = {(u["layer"], u["head"]): u["loss_increase"] for u in found["units"]}
    assert {row["loss_increase"][0] for row in found["removals"]} <= set(alone.values())
    yardstick = next(
        r for r in found["removals"] if (r["predictor"], r["order"]) == ("measured alone", "most")
    )
    assert yardstick["kl"][0] == max(u["kl"] for u in found["units"])
    pytest.importorskip("matplotlib")
    assert (tmp_path / "look" / "ablation.png").stat().st_size > 10_000
