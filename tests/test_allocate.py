"""The planner spends its budget well and never beyond."""

import itertools

import pytest
import torch

from lrkv_convert import LrkvError
from lrkv_convert.families import FAMILIES, Geometry, Site
from lrkv_convert.forms import FORMS
from lrkv_convert.plan.allocate import Point, allocate, hull

G = Geometry(width=48, kv_heads=3, groups=2, head_dim=20, rotary_dim=20)
LLAMA = FAMILIES["llama"].any
SITES = [Site(i, "self", LLAMA.module(i).rstrip("."), LLAMA, G) for i in range(2)]
SMOL = Geometry(width=576, kv_heads=3, groups=3, head_dim=64, rotary_dim=64)


def curves(seed: int):
    """Random falling convex curves, (keys, values) of two layers."""
    generator = torch.Generator().manual_seed(seed)

    def one():
        steps = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        loss, points = sum(steps), []
        for i, step in enumerate([*steps, 0.0]):
            points.append(Point(12 * (i + 1), 0, 12 * (i + 1), loss))
            loss -= step
        return points

    return [(one(), one()) for _ in range(2)]


def total(plan, found):
    """Loss of a plan, looked up in the curves."""
    loss = {
        (i, s, p.width): p.loss
        for i, pair in enumerate(found)
        for s, curve in enumerate(pair)
        for p in curve
    }
    return sum(
        loss[site.layer, 0, site.keys.width] + loss[site.layer, 1, site.values.width]
        for site in plan.sites
    )


@pytest.mark.parametrize("seed, ratio", itertools.product(range(4), (0.3, 0.5, 0.7)))
def test_no_plan_of_the_same_size_is_better(seed, ratio):
    """Against all 5^4 plans: convex curves with equal steps are spent optimally."""
    found = curves(seed)
    plan = allocate(found, SITES, 2, 4, ratio)
    assert plan.ratio <= ratio
    budget = int(ratio * 2 * 2 * 3 * 20)
    best = min(
        sum(p.loss for p in choice)
        for choice in itertools.product(*(curve for pair in found for curve in pair))
        if sum(p.size for p in choice) <= budget
    )
    assert total(plan, found) == pytest.approx(best)


def test_the_hull_skips_what_is_not_worth_a_stop():
    points = [
        Point(1, 0, 1, 10.0),
        Point(2, 0, 2, 9.5),
        Point(3, 0, 3, 2.0),
        Point(4, 0, 4, 2.5),
        Point(5, 0, 5, 1.0),
    ]
    assert [p.size for p in hull(points)] == [1, 3, 5]


def path(form: str, geometry: Geometry, cap: int) -> list[tuple[int, int]]:
    """(m, r) along the path of a budget."""
    shapes = FORMS[form].candidates(geometry, cap)
    assert all(shape.form == form for shape in shapes)
    return [(shape.width, shape.rank) for shape in shapes]


def test_candidates_widen_the_base_first_and_keep_to_the_steps():
    ranks = list(range(4, 43, 4))
    assert path("joint", SMOL, cap=64) == [
        (16, 0),
        (32, 0),
        (48, 0),
        (64, 0),
        *((64, r) for r in ranks),
    ]
    # never wider than all heads together
    assert max(m for m, _ in path("joint", SMOL, cap=256)) == 192
    assert path("rotary", SMOL, cap=16) == [(64, 0), *((64, r) for r in ranks)]
    assert path("per-head", SMOL, cap=16) == [(0, r) for r in range(4, 65, 4)]
    assert path("commuting", SMOL, cap=50) == [(16, 0), (32, 0), (48, 0), (50, 0)]
    assert path("full", SMOL, cap=16) == [(0, 64)]


@pytest.mark.parametrize("form", FORMS)
def test_no_shape_of_a_form_caches_more_than_the_original(form):
    for geometry in (G, SMOL):
        for cap in (16, 1000):
            shapes = FORMS[form].candidates(geometry, cap)
            assert all(
                0 < FORMS[form].numbers(shape, geometry) <= geometry.kv_heads * geometry.head_dim
                for shape in shapes
            )


def test_a_budget_below_the_floor_is_refused():
    with pytest.raises(LrkvError, match="floor of this model is 0.200"):
        allocate(curves(0), SITES, 2, 4, 0.1)
