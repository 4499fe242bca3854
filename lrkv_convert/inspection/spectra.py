"""How compressible the heads of one layer are, in the metric that a conversion fits in
(fit/metric.py).

    A_h = Sigma^(1/2) W_h M_h^(1/2)        energy of a head: |A_h|_F^2, the sum of its squared
                                           singular values

In the Fisher metric half of a squared error is what it costs in nats of KL(original || converted),
to second order: a head's energy / 2 is the predicted price of losing it, and half of the error of
the joint fit at rank r, summed over layers, keys and values, that of a conversion. Shapes: H KV
heads, D width, d head width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families import AttentionWeights
from ..fit.bases import SWEEPS, error_curve, joint
from ..fit.metric import LayerMetrics, Metric
from .diversity import gram


@dataclass(frozen=True)
class Spectrum:
    """Keys or values of one layer.

    singular (H, d): singular values of the A_h, largest first; outside (H,): share of each head's
    energy that the leading d directions of all heads together, the shared base, leave out; squared:
    squared error of the joint fit with that base, absolute, for each rank.
    """

    singular: Tensor
    outside: Tensor
    squared: dict[int, float]

    @property
    def energies(self) -> Tensor:
        """|A_h|^2, (H,)."""
        return self.singular.square().sum(-1)

    @property
    def total(self) -> float:
        return self.energies.sum().item()

    @property
    def base_share(self) -> float:
        """Share of the energy of all heads that the shared base explains alone, without
        residuals.
        """
        return 1 - (self.outside * self.energies).sum().item() / self.total if self.total else 1.0

    def error(self, rank: int) -> float:
        """Relative error of the joint fit, as a conversion records it."""
        return (self.squared[rank] / self.total) ** 0.5 if self.total else 0.0

    def predicted_kl(self, rank: int) -> float:
        """Half the squared error: nats per token in the Fisher metric."""
        return self.squared[rank] / 2

    def dimensions(self, share: float) -> Tensor:
        """How many singular values hold that share of each head's energy, (H,) integers; 0 for a
        head without any.
        """
        energy = self.singular.square()
        return torch.where(
            self.energies > 0,
            (energy.cumsum(-1) < share * self.energies.unsqueeze(-1)).sum(-1) + 1,
            0,
        ).clamp_max(energy.shape[-1])


def spectrum(W: Tensor, metric: Metric, ranks: list[int]) -> Spectrum:
    """Spectrum of W (H, D, d) with errors at these ranks, all with a base d wide.

    With one Sigma for all heads. The fit takes as many sweeps as a conversion's own: for keys the
    errors are those that it will report for the same text, for values, which a conversion goes on
    to fit head by head, a little more.
    """
    metric = replace(metric, grams=None)
    # (D, d) each: W_h M_h^(1/2)
    d, heads = W.shape[2], [w.double() @ M for w, M in zip(W, metric.M.root)]
    # (H, d)
    singular = torch.stack(
        [torch.linalg.eigvalsh(A.T @ (metric.sigma @ A)).clamp_min(0).flip(0).sqrt() for A in heads]
    )
    base = joint(W, metric, d, 0)
    left = [A - base.head(h) @ M for h, (A, M) in enumerate(zip(heads, metric.M.root))]
    # (H,)
    beyond = torch.stack([(E * (metric.sigma @ E)).sum().clamp_min(0) for E in left])
    energy = singular.square().sum(-1)
    outside = torch.where(energy > 0, beyond / torch.where(energy > 0, energy, 1.0), 0.0)
    return Spectrum(
        singular.cpu(),
        outside.cpu(),
        dict(zip(ranks, error_curve(W, metric, [(d, r) for r in ranks], SWEEPS))),
    )


@dataclass(frozen=True)
class LayerLook:
    """One layer: the spectra of its keys and values, and [s_ij] of its n query heads, (n, n)."""

    keys: Spectrum
    values: Spectrum
    gram: Tensor

    def predicted_kl(self, rank: int) -> float:
        return self.keys.predicted_kl(rank) + self.values.predicted_kl(rank)


def look(weights: AttentionWeights, metrics: LayerMetrics, ranks: list[int]) -> LayerLook:
    """Look at one calibrated layer."""
    return LayerLook(
        spectrum(weights.W_K, metrics.keys, ranks),
        spectrum(weights.W_V, metrics.values, ranks),
        gram(weights.W_Q, weights.W_K).cpu(),
    )
