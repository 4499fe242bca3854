"""The joint fit with a Sigma per head, or per run of heads. float64 throughout."""
import pytest
import torch

from lrkv_convert import per_head
from lrkv_convert.adapters import Geometry
from lrkv_convert.factorise import joint
from lrkv_convert.metrics import GRAM_NUMBERS, Metric, run_count, runs, square_root

H, D, d, m, r = 4, 48, 10, 12, 3
EXACT = 1e-9


def problem(count: int, alike: bool = False, seed: int = 0):
    """W (H, D, d), the Sigma of every head (H, D, D), and the metric: `count` runs of heads share one."""
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
    W_all, Q = W.transpose(0, 1).reshape(D, H * d), draw(H, 50, d) * torch.linspace(1, 0.2, d, dtype=torch.float64)
    return W, every, Metric(every.mean(0), square_root(Q.mT @ Q), W_all.T @ own @ W_all)


def error(W, What, sigmas, metric) -> float:
    return sum((square_root(S).root @ E @ M).square().sum() for S, E, M in zip(sigmas, W - What, metric.M.root)).sqrt().item()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("m, r", [(m, r), (m, 0), (0, r), (2 * m, 1)])
def test_reported_error_is_the_error_and_no_more_than_with_one_sigma(count, m, r):
    W, sigmas, metric = problem(count)
    alone, shared = joint(W, metric, m, r), joint(W, Metric(metric.sigma, metric.M), m, r)
    assert alone.error == pytest.approx(error(W, alone.heads(), sigmas, metric) / error(W, torch.zeros_like(W), sigmas, metric), rel=1e-6)
    assert error(W, alone.heads(), sigmas, metric) < 0.999 * error(W, shared.heads(), sigmas, metric)
    assert all(later <= before * (1 + 1e-9) for before, later in zip(alone.history, alone.history[1:]))
    assert len(alone.history) > 1 or m == 0


def test_heads_that_are_alike_gain_nothing(monkeypatch):
    """One Sigma for all, written down once per head: both fits end at the same error."""
    W, _, metric = problem(4, alike=True)
    monkeypatch.setattr(per_head, "SWEEPS", 400)
    monkeypatch.setattr(per_head, "STOP", 1e-7)
    alone, shared = joint(W, metric, m, r), joint(W, Metric(metric.sigma, metric.M), m, r, sweeps=1000)
    assert alone.error == pytest.approx(shared.error, rel=0.02)       # alternations stop at slightly different places


def test_full_rank_is_exact():
    W, _, metric = problem(4)
    for shape in ((m, d), (H * d, 0), (0, d)):
        assert (joint(W, metric, *shape).heads() - W).abs().max() < EXACT * W.abs().max(), shape


def test_without_base_the_error_is_the_discarded_singular_values_of_each_head():
    W, sigmas, metric = problem(4)
    beyond = sum(torch.linalg.svdvals(square_root(S).root @ w @ M)[r:].square().sum() for S, w, M in zip(sigmas, W, metric.M.root)).sqrt().item()
    assert error(W, joint(W, metric, 0, r).heads(), sigmas, metric) == pytest.approx(beyond, rel=1e-9)


def test_no_other_base_in_the_span_is_better_nearby():
    """Where the alternation stops, the error does not fall along random changes of W_shared, C_h and residuals refitted."""
    W, sigmas, metric = problem(4)
    fit, g = joint(W, metric, m, 0), torch.Generator().manual_seed(1)
    W_all, best = W.transpose(0, 1).reshape(D, H * d), error(W, fit.heads(), sigmas, metric)
    for _ in range(10):
        base = fit.W_shared + 1e-3 * fit.W_shared.norm() / D**0.5 * W_all @ torch.randn(H * d, m, generator=g, dtype=torch.float64) / (H * d)
        refitted = torch.stack([base @ torch.linalg.solve(base.T @ S @ base, base.T @ S @ w) for S, w in zip(sigmas, W)])
        assert error(W, refitted, sigmas, metric) > 0.9999 * best


def test_dead_heads_and_singular_metrics_stay_finite():
    W, _, metric = problem(4)
    W[1] = 0
    W_all = W.transpose(0, 1).reshape(D, H * d)
    grams = (W_all.T @ torch.diag(torch.arange(D) < 5).double() @ W_all).expand(4, -1, -1)
    fit = joint(W, Metric(metric.sigma, metric.M, grams.clone()), m, r)
    assert torch.isfinite(fit.heads()).all() and fit.error < 1e-6


def test_memory_decides_how_many_heads_share_a_sigma():
    counts = {(H, d): run_count(Geometry(1, 8, H, 1, d)) for H, d in ((3, 64), (8, 128), (12, 64), (32, 80), (32, 128))}
    assert counts == {(3, 64): 3, (8, 128): 8, (12, 64): 8, (32, 80): 5, (32, 128): 0}
    assert all(count * (H * d)**2 <= GRAM_NUMBERS for (H, d), count in counts.items())
