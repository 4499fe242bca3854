"""The joint fit with a Sigma per head, or per run of heads. float64 throughout."""

import math

import pytest
import torch

from lrkv_convert.families import AttentionWeights, Geometry
from lrkv_convert.fit import per_head
from lrkv_convert.fit.bases import joint
from lrkv_convert.fit.metric import (
    GRAM_NUMBERS,
    SHRINKAGE,
    LayerMetrics,
    Metric,
    head_basis,
    run_count,
    runs,
    square_root,
)
from lrkv_convert.fit.per_head import refine
from lrkv_convert.observe.sums import MetricSums

H, D, d, m, r = 4, 48, 10, 12, 3
EXACT = 1e-9


def problem(count: int, alike: bool = False, seed: int = 0):
    """W (H, D, d), the Sigma of every head (H, D, D), and the metric: `count` runs of heads share
    one.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    shared = draw(D, d)
    W = torch.stack([0.7 * shared @ draw(d, d) / d**0.5 + draw(D, d) for _ in range(H)])
    spectrum = torch.logspace(0, -1.5, D, dtype=torch.float64)
    X = [draw(200, D) * spectrum[torch.randperm(D, generator=g)] for _ in range(count)]
    own = torch.stack([x.T @ x for x in ([X[0]] * count if alike else X)])
    every = torch.empty(H, D, D, dtype=torch.float64)
    for sigma, heads in zip(own, runs(H, count)):
        every[heads] = sigma
    basis, queries = head_basis(W), draw(H, 50, d) * torch.linspace(1, 0.2, d, dtype=torch.float64)
    return W, every, Metric(every.mean(0), square_root(queries.mT @ queries), basis.T @ own @ basis)


def error(W, What, sigmas, metric) -> float:
    return (
        sum(
            (square_root(S).root @ E @ M).square().sum()
            for S, E, M in zip(sigmas, W - What, metric.M.root)
        )
        .sqrt()
        .item()
    )


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("m, r", [(m, r), (m, 0), (0, r), (2 * m, 1)])
def test_reported_error_is_the_error_and_no_more_than_with_one_sigma(count, m, r):
    W, sigmas, metric = problem(count)
    alone, shared = joint(W, metric, m, r), joint(W, Metric(metric.sigma, metric.M), m, r)
    assert alone.error == pytest.approx(
        error(W, alone.heads(), sigmas, metric) / error(W, torch.zeros_like(W), sigmas, metric),
        rel=1e-6,
    )
    assert error(W, alone.heads(), sigmas, metric) < 0.999 * error(
        W, shared.heads(), sigmas, metric
    )
    ended = (
        len(alone.history) == per_head.SWEEPS
        or m == 0
        or 1 - (alone.history[-1] / alone.history[-2]) ** 2 < per_head.STOP
    )
    assert ended, "a round raised the error, and the one before was kept"
    assert len(alone.history) > 1 or m == 0


def begun(W, metric, m, r) -> tuple:
    """What `refine` is given by `joint`: from the fit with one Sigma for all heads."""
    one, Q = joint(W, Metric(metric.sigma, metric.M), m, r), head_basis(W)
    return metric.grams, Q.T @ W @ metric.M.root, Q.T @ one.W_shared, r


def test_heads_that_are_alike_gain_nothing():
    """One Sigma for all, written down once per head: both fits end at the same error."""
    W, _, metric = problem(4, alike=True)
    *_, history = refine(*begun(W, metric, m, r), sweeps=400, stop=1e-7)
    shared = joint(W, Metric(metric.sigma, metric.M), m, r, sweeps=1000)
    # alternations stop at slightly different places
    assert history[-1] == pytest.approx(shared.error, rel=0.02)


def test_full_rank_is_exact():
    W, _, metric = problem(4)
    for shape in ((m, d), (H * d, 0), (0, d)):
        assert (joint(W, metric, *shape).heads() - W).abs().max() < EXACT * W.abs().max(), shape


def test_without_base_the_error_is_the_discarded_singular_values_of_each_head():
    W, sigmas, metric = problem(4)
    beyond = (
        sum(
            torch.linalg.svdvals(square_root(S).root @ w @ M)[r:].square().sum()
            for S, w, M in zip(sigmas, W, metric.M.root)
        )
        .sqrt()
        .item()
    )
    assert error(W, joint(W, metric, 0, r).heads(), sigmas, metric) == pytest.approx(
        beyond, rel=1e-9
    )


@pytest.mark.parametrize("m, r", [(m, r), (m, 0)])
def test_it_ends_near_where_the_alternation_would_end(m, r):
    W, _, metric = problem(4)
    fit = joint(W, metric, m, r).history
    assert refine(*begun(W, metric, m, r))[-1] == pytest.approx(fit, rel=1e-9)
    last = refine(*begun(W, metric, m, r), sweeps=500, stop=0.0)[-1]
    assert len(last) > len(fit) and fit[-1] - last[-1] < 0.25 * (fit[0] - last[-1]), (
        fit[0],
        fit[-1],
        last[-1],
    )


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-6])
def test_sums_in_float32_are_enough(spread):
    """Also where some directions of the heads are far weaker than others, and one token far larger:
    W is square, as in multi-head attention.
    """
    g, D, T = torch.Generator().manual_seed(0), H * d, 64
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    left, right = (torch.linalg.qr(draw(D, D))[0] for _ in range(2))
    W = (
        (left * torch.logspace(0, math.log10(spread), D, dtype=torch.float64) @ right)
        .reshape(D, H, d)
        .transpose(0, 1)
        .contiguous()
    )
    weights = AttentionWeights(draw(H, 1, D, d), draw(H, D, d), W, draw(H, 1, d, D))
    geometry = Geometry(D, H, 1, d)
    sums, exact = (
        MetricSums(weights, geometry, {"attention"}, torch.device("cpu")),
        torch.zeros(H, D, D, dtype=torch.float64),
    )
    for _ in range(6):
        x = draw(T, D)
        x[0] *= 100
        attention = torch.softmax(
            torch.full((H, T, T), -torch.inf).double().triu(1) + 3 * draw(H, T, T), -1
        )
        sums.add(x.float(), attention.float())
        z = attention @ x
        exact += z.mT @ z
    metric = LayerMetrics(weights, geometry, "attention", sums.state()).values
    exact = exact / (6 * T) + SHRINKAGE * exact.diagonal(dim1=1, dim2=2).mean() / (
        6 * T
    ) * torch.eye(D, dtype=torch.float64)
    for m, r in ((12, 3), (20, 0)):
        fit = joint(W, metric, m, r)
        true = error(W, fit.heads(), exact, metric) / error(W, torch.zeros_like(W), exact, metric)
        assert fit.error == pytest.approx(true, rel=1e-2)
        shared = joint(W, Metric(metric.sigma, metric.M), m, r)
        assert true < error(W, shared.heads(), exact, metric) / error(
            W, torch.zeros_like(W), exact, metric
        )


def test_dead_heads_and_singular_metrics_stay_finite():
    W, _, metric = problem(4)
    W[1] = 0
    basis = head_basis(W)
    grams = (basis.T @ torch.diag(torch.arange(D) < 5).double() @ basis).expand(4, -1, -1)
    fit = joint(W, Metric(metric.sigma, metric.M, grams.clone()), m, r)
    assert torch.isfinite(fit.heads()).all() and fit.error < 1e-6


def test_a_single_sigma_is_not_summed_twice():
    assert run_count(Geometry(64, 1, 8, 64)) == 0


def test_memory_decides_how_many_heads_share_a_sigma():
    counts = {
        (H, d): run_count(Geometry(H * d, H, 1, d))
        for H, d in ((3, 64), (8, 128), (12, 64), (32, 80), (32, 128))
    }
    assert counts == {(3, 64): 3, (8, 128): 8, (12, 64): 8, (32, 80): 5, (32, 128): 0}
    assert all(count * (H * d) ** 2 <= GRAM_NUMBERS for (H, d), count in counts.items())
