"""Theorems of the factorisation. float64 throughout, so tolerances are those of decompositions, not
of data.
"""

import itertools
from functools import partial

import pytest
import torch

from lrkv_convert.families import Geometry
from lrkv_convert.fit.bases import BASES, aligned, error_curve, grouped, joint, mean, pooled
from lrkv_convert.fit.metric import Metric, square_root
from lrkv_convert.forms import FORMS, Shape
from lrkv_convert.modeling import forms_lrkv

EXACT = 1e-9  # float64 eigendecompositions of well-conditioned matrices a few dozen wide
H, D, d, r = 3, 48, 20, 7
RESIDUAL = ("joint", "aligned", "mean")  # bases that take residuals


def random_problem(seed: int = 0, rotary: bool = False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    shared = draw(D, d)
    W = torch.stack([0.5 * shared @ draw(d, d) / d**0.5 + draw(D, d) for _ in range(H)])
    X, Q = (
        draw(200, D) * torch.logspace(0, -1.5, D, dtype=torch.float64),
        draw(H, 100, d) * torch.linspace(1, 0.2, d, dtype=torch.float64),
    )
    M = Q.mT @ Q
    if rotary:
        half = M.diagonal(dim1=-2, dim2=-1)[:, : d // 2]
        M = torch.diag_embed(torch.cat((half, half), -1))
    return W, Metric(X.T @ X, square_root(M))


def root(metric) -> torch.Tensor:
    return square_root(metric.sigma).root


def error(W, What, metric) -> float:
    return (root(metric) @ (W - What) @ metric.M.root).square().sum().sqrt().item()


def norm(W, metric) -> float:
    return error(W, torch.zeros_like(W), metric)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("base", RESIDUAL)
def test_full_rank_is_exact(base, rotary):
    W, metric = random_problem(rotary=rotary)
    factors = BASES[base](W, metric, d, d, rotary=rotary)
    assert (factors.heads() - W).abs().max() < EXACT * W.abs().max()


@pytest.mark.parametrize("base", RESIDUAL)
def test_reported_error_is_the_error(base):
    W, metric = random_problem(rotary=True)
    factors = BASES[base](W, metric, d, r, rotary=True)
    assert factors.error == pytest.approx(
        error(W, factors.heads(), metric) / norm(W, metric), rel=1e-12
    )


def test_rank_zero_of_the_mean_is_multi_query_attention():
    W, metric = random_problem()
    factors = mean(W, metric, d, 0)
    assert factors.C is None and factors.U.shape[-1] == 0
    assert torch.equal(factors.heads(), W.mean(0).expand(H, -1, -1))


def test_without_base_the_error_is_the_discarded_singular_values():
    W, metric = random_problem()
    factors = joint(W, metric, 0, r)
    discarded = (
        torch.linalg.svdvals(root(metric) @ W @ metric.M.root)[:, r:].square().sum().sqrt().item()
    )
    assert error(W, factors.heads(), metric) == pytest.approx(discarded, rel=EXACT)


def test_without_residual_the_error_is_the_discarded_singular_values_of_all_heads():
    W, metric = random_problem()
    factors = joint(W, metric, d, 0)
    stacked = (root(metric) @ W @ metric.M.root).transpose(0, 1).reshape(D, -1)
    discarded = torch.linalg.svdvals(stacked)[d:].square().sum().sqrt().item()
    assert error(W, factors.heads(), metric) == pytest.approx(discarded, rel=EXACT)


def test_error_never_rises_over_sweeps():
    W, metric = random_problem()
    history = joint(W, metric, d, r, sweeps=30).history
    assert len(history) > 3
    assert all(later <= earlier * (1 + EXACT) for earlier, later in itertools.pairwise(history))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("base", RESIDUAL)
def test_error_never_rises_with_rank(base, rotary):
    W, metric = random_problem(rotary=rotary)
    errors = [BASES[base](W, metric, d, rank, rotary=rotary).error for rank in (0, 3, 7, 12, 20)]
    # alternation stops at 1e-5
    assert all(
        later <= earlier * (1 + 1e-4) + EXACT for earlier, later in itertools.pairwise(errors)
    )


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_bytes_joint_lies_between_joint_latent_and_per_head(seed):
    W, metric = random_problem(seed)
    m, rank = 9, 5  # m + H r = 24 = 3 * 8
    between = joint(W, metric, m, rank).error
    assert joint(W, metric, m + H * rank, 0).error <= between * (1 + EXACT)
    assert between <= joint(W, metric, 0, (m + H * rank) // H).error


def test_joint_beats_aligned_and_aligned_beats_mean():
    W, metric = random_problem(rotary=True)
    errors = [
        BASES[base](W, metric, d, r, rotary=True).error for base in ("joint", "aligned", "mean")
    ]
    assert errors == sorted(errors)


def test_a_rotary_gauge_commutes_with_rope():
    W, metric = random_problem(rotary=True)
    gauge = aligned(W, metric, d, r, rotary=True).gauge
    angles = torch.linspace(0.3, 2.0, d // 2, dtype=torch.float64)
    c, s = torch.diag(angles.cos()), torch.diag(angles.sin())
    # acts on row vectors, half-split layout
    rotation = torch.cat((torch.cat((c, s), 1), torch.cat((-s, c), 1)))
    assert torch.allclose(gauge @ rotation, rotation @ gauge, atol=1e-12)


def test_zero_weights_and_singular_metrics_stay_finite():
    W, metric = random_problem()
    flat = Metric(
        torch.zeros(D, D, dtype=torch.float64),
        square_root(torch.diag(torch.arange(d) < 3).double().expand(H, -1, -1)),
    )
    for problem in ((torch.zeros_like(W), metric), (W, flat)):
        for base, rank in [(name, r) for name in RESIDUAL] + [("pooled", 0), ("grouped", 0)]:
            factors = BASES[base](*problem, d, rank)
            assert all(
                torch.isfinite(t).all()
                for t in (factors.W_shared, factors.U, factors.B, factors.heads())
            )


def test_bases_other_than_joint_refuse_another_width():
    W, metric = random_problem()
    for base in (aligned, mean):
        with pytest.raises(ValueError, match="as wide as a head"):
            base(W, metric, d + 4, r)


def test_pooling_all_heads_into_one_is_the_mean_without_residual():
    W, metric = random_problem()
    assert torch.allclose(pooled(W, metric, d, 0).heads(), mean(W, metric, d, 0).heads())
    assert torch.allclose(pooled(W, metric, H * d, 0).heads(), W)


def test_grouped_latents_are_truncated_within_their_groups():
    W, metric = random_problem()
    # heads 0, 1 and head 2, twelve numbers each
    factors = grouped(W, metric, 24, 0)
    A = root(metric) @ W @ metric.M.root
    parts = [A[:2].transpose(0, 1).reshape(D, -1), A[2]]
    discarded = sum(torch.linalg.svdvals(part)[12:].square().sum() for part in parts).sqrt().item()
    assert error(W, factors.heads(), metric) == pytest.approx(discarded, rel=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_bytes_lrkv_lies_between_joint_latent_and_mean(seed):
    W, metric = random_problem(seed)
    for rank in (2, 7, 11):
        latent, lrkv, plain = (
            joint(W, metric, d + H * rank, 0),
            joint(W, metric, d, rank),
            mean(W, metric, d, rank),
        )
        assert latent.error <= lrkv.error * (1 + EXACT) and lrkv.error <= plain.error


def test_the_curve_is_the_squared_error_of_the_fit():
    W, metric = random_problem()
    shapes = [(8, 0), (20, 0), (20, 4), (60, 0)]
    for (m, rank), found in zip(shapes, error_curve(W, metric, shapes, sweeps=12)):
        assert found == pytest.approx(
            error(W, joint(W, metric, m, rank).heads(), metric) ** 2, rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("m, rank", [(8, 3), (20, 0), (20, 7), (0, 5)])
def test_subspace_iteration_finds_what_the_eigendecomposition_finds(m, rank):
    """Wide models take the iterative way: within a per mille of the exact fit, never rising, and
    exact in what it reports.
    """
    W, metric = random_problem()
    exact = joint(W, metric, m, rank, sweeps=30)
    iterated = partial(joint, W, metric, eigh_up_to=0)
    found = iterated(m, rank, sweeps=30)
    assert found.error == pytest.approx(exact.error, rel=1e-3)
    assert all(
        later <= earlier * (1 + EXACT) for earlier, later in zip(found.history, found.history[1:])
    )
    assert found.error == pytest.approx(
        error(W, found.heads(), metric) / norm(W, metric), rel=1e-12
    )
    assert (iterated(m, d).heads() - W).abs().max() < EXACT * W.abs().max()


# ------------------------------------------------------------------------------------------ forms


TURNING = Geometry(D, H, 2, d, rotary_dim=d)


def fitted(width: int, bias=None, rotary: bool = True) -> tuple:
    """Commuting keys of this width, as the module that a converted model has them in, and their
    reported error.
    """
    W, metric = random_problem(rotary=rotary)
    fit = FORMS["commuting"].fit(W, bias, metric, Shape(width, 0, "commuting"), TURNING, "joint")
    heads = forms_lrkv.FORMS["commuting"](D, H, d, width, 0, True, bias is not None, **fit.found)
    heads.double().load_state_dict(fit.tensors)
    return heads, fit.error


def turned(heads, angle: float) -> torch.Tensor:
    """Keys (H, 1 + D, d) of nothing and of unit inputs, after RoPE at a position."""
    x = torch.cat((torch.zeros(1, D), torch.eye(D))).double().unsqueeze(0)
    angles = angle * 100.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    angles = torch.cat((angles, angles)).expand(1, 1 + D, d)
    rotation = angles.cos(), angles.sin()
    return heads.rebuild(heads.encode(x, rotation), rotation)[0]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_all_commuting_latents_are_the_keys_at_any_position(biased, rotary):
    W, _ = random_problem(rotary=rotary)
    b = torch.randn(H, d, generator=torch.Generator().manual_seed(3)).double()
    heads, error = fitted(H * d, b if biased else None, rotary)
    whole = forms_lrkv.FORMS["full"](D, H, d, 0, d, True, biased)
    tensors = {"U.weight": W.transpose(1, 2).flatten(0, 1)}
    whole.double().load_state_dict(tensors | ({"bias": b} if biased else {}))
    with torch.no_grad():
        for angle in (0.0, 0.7, 40.0):
            expected = turned(whole, angle)
            assert (turned(heads, angle) - expected).abs().max() < EXACT * W.abs().max()
    assert error < 1e-6 and (heads.matrices() - W).abs().max() < EXACT * W.abs().max()


def test_the_error_of_commuting_latents_is_the_eigenvalues_they_leave_out():
    """In a metric that RoPE leaves alone; it falls with every latent."""
    W, metric = random_problem(rotary=True)
    widths = [2, 14, 30, 58]
    shapes = [Shape(m, 0, "commuting") for m in widths]
    curve, errors = FORMS["commuting"].curve(W, None, metric, shapes), []
    for m, found in zip(widths, curve):
        heads, reported = fitted(m)
        errors.append(error(W, heads.matrices(), metric))
        assert found == pytest.approx(errors[-1] ** 2, rel=1e-9)
        assert reported == pytest.approx(errors[-1] / norm(W, metric), rel=1e-9)
    assert errors == sorted(errors, reverse=True)


def test_one_latent_a_frequency_is_no_better_than_the_same_number_where_they_matter():
    """One a frequency is what an aligned base without residuals is."""
    W, metric = random_problem(rotary=True)
    alike = aligned(W, metric, d, 0, rotary=True).error
    chosen = fitted(d)[1]
    assert chosen <= alike * (1 + EXACT)
    assert len(set(fitted(d)[0].kept)) > 1
