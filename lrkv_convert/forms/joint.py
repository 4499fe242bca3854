"""Base and residual: W_h ~ W_shared C_h + U_h B_h^T (arXiv 2601.11471), x W_shared and x U_h
cached. The form of values, and of keys unless another is asked for: those lie unrotated in the
cache and, under RoPE, are rebuilt and rotated when read, which gives the best quality per byte.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import LrkvError
from ..families import Geometry
from ..fit.bases import BASES, Factors, error_curve, joint, joint_gains
from ..fit.codes import coded, codings
from ..fit.metric import Metric
from ..modeling.codes_lrkv import Blocks
from .base import (
    WIDTH_STEP,
    Asked,
    Fitted,
    Form,
    Shape,
    first,
    query_heads,
    residual_ranks,
    slices,
)

TINY = 1e-300


class Joint(Form):
    name = runtime = "joint"
    says = (
        "base and residual before rotation, rebuilt and rotated when read: the best quality per"
        " byte"
    )
    sized = any_base = coded = grouped = True

    def check_geometry(self, geometry, base, config):
        if base == "aligned" and (geometry.key_norm or 0 < geometry.rotary_dim < geometry.head_dim):
            raise LrkvError(
                "the aligned base does not go with QK-norm, nor with RoPE on a part of each head",
                "nothing may pass between queries and keys there; leave --base out",
            )

    def shape(self, asked: Asked, geometry: Geometry) -> Shape:
        width = geometry.head_dim if asked.width is None else asked.width
        return Shape(width, first(asked.own_rank, asked.rank, asked.default), self.name)

    def candidates(self, geometry: Geometry, cap: int) -> list[Shape]:
        """Widths up to the cap without residual, then ranks at the cap."""
        whole = geometry.kv_heads * geometry.head_dim
        cap = min(cap, whole)
        widths = sorted({*range(WIDTH_STEP, cap, WIDTH_STEP), cap})
        return self.along(geometry, widths)

    def along(self, geometry: Geometry, widths: list[int]) -> list[Shape]:
        """These widths without residual, then ranks at the last of them."""
        H, d = geometry.kv_heads, geometry.head_dim
        return [Shape(m, 0, self.name) for m in widths] + [
            Shape(widths[-1], r, self.name)
            for r in residual_ranks(d)
            if widths[-1] + H * r <= H * d
        ]

    def work(self, shape: Shape, geometry: Geometry) -> int:
        """Nothing is rebuilt where nothing turns or normalises it (Eq 6-7: queries and outputs are
        mapped instead, once per step), else once per KV head.
        """
        if not geometry.rebuilt:
            return query_heads(geometry) * (shape.width + shape.rank)
        return self.rebuilding(shape.width + shape.rank, geometry)

    def effort(self, geometry: Geometry, groups: int = 1) -> int:
        return geometry.kv_heads // groups * geometry.head_dim

    def rebuilding(self, numbers: int, geometry: Geometry) -> int:
        """Multiply-adds to rebuild every KV head of a token from so many numbers and to meet it
        with its queries.
        """
        d = geometry.head_dim
        return geometry.kv_heads * numbers * d + query_heads(geometry) * d

    def fit(
        self,
        W: Tensor,
        bias: Tensor | None,
        metric: Metric,
        shape: Shape,
        geometry: Geometry,
        base: str,
    ) -> Fitted:
        if shape.coded:
            return self.fit_codes(W, bias, metric, shape)
        fit = BASES[self.base(base)](W, metric, shape.width, shape.rank, rotary=geometry.rotary)
        return Fitted(tensors_of(fit, bias), fit.error, fit.gauge)

    def fit_codes(self, W: Tensor, bias: Tensor | None, metric: Metric, shape: Shape) -> Fitted:
        """The fit of latents that become codes, in the covariance of usual tokens."""
        if shape.groups > 1:
            return self.fit_groups(W, bias, metric, shape)
        fit, (base, residual) = joint(W, metric, shape.width, shape.rank), shape.codes
        slots: dict[str, tuple[Tensor, Tensor]] = {}
        codes: dict[str, Blocks] = {}
        if base is not None and fit.C is not None:
            slots["base"], codes["base"] = (fit.W_shared[None], fit.C[None]), base
        if residual is not None:
            slots["residual"], codes["residual"] = (fit.U, fit.B.mT.unsqueeze(1)), residual
        ready, bias, lifts, noise = coded(W, bias, slots, codes, metric)
        factors = Factors(
            ready["base"].weights[0] if "base" in ready else fit.W_shared,
            ready["base"].maps[0] if "base" in ready else fit.C,
            ready["residual"].weights if "residual" in ready else fit.U,
            ready["residual"].maps[:, 0].mT if "residual" in ready else fit.B,
            None,
            fit.error,
        )
        tensors = tensors_of(factors, bias)
        for name, slot in ready.items():
            tensors |= {f"{name}_codes.centres": slot.centres, f"{name}_codes.lift": lifts[name]}
        total = error_curve(W, metric, [(0, 0)])[0]
        return Fitted(tensors, (fit.error**2 + noise / total) ** 0.5 if total > 0 else 0.0)

    def fit_groups(self, W: Tensor, bias: Tensor | None, metric: Metric, shape: Shape) -> Fitted:
        """The same, a base for each group of heads."""
        heads = slices(len(W), shape.groups)
        fits = [joint(W[part], metric.of(part), shape.width, 0) for part in heads]
        weights = torch.stack([fit.W_shared for fit in fits])  # (g, D, m)
        maps = torch.stack([cast(Tensor, fit.C) for fit in fits])  # (g, H / g, m, d)
        slots = {"base": (weights, maps)}
        ready, bias, lifts, noise = coded(W, bias, slots, {"base": shape.codes[0] or ()}, metric)
        base = ready["base"]
        tensors = {
            "W_shared.weight": base.weights.mT.flatten(0, 1),
            "C": base.maps.flatten(0, 1),
            "bias": bias,
            "base_codes.centres": base.centres,
            "base_codes.lift": lifts["base"],
        }
        totals = [error_curve(W[part], metric.of(part), [(0, 0)])[0] for part in heads]
        lost = noise + sum(fit.error**2 * total for fit, total in zip(fits, totals))
        return Fitted(tensors, (lost / sum(totals)) ** 0.5 if sum(totals) > 0 else 0.0)

    def coded_curve(
        self,
        W: Tensor,
        metric: Metric,
        widths: Sequence[int],
        geometry: Geometry,
        groups: int = 1,
    ) -> list[tuple[Shape, float]]:
        parts = []
        for heads in slices(len(W), groups):
            own = metric.of(heads)
            assert own.shares is not None
            parts.append(torch.stack(joint_gains(W[heads], own, own.shares)))
        # all groups have as many latents of each width: what one of these is worth on average
        gains, shares = torch.stack(parts, dim=1)  # (g, n) each
        shares = (gains * shares).sum(0) / gains.sum(0).clamp_min(TINY)
        return [
            (
                Shape(found.width, 0, self.name, (found.blocks, None), groups),
                groups * found.loss,
            )
            for found in codings(gains.mean(0), shares, widths)
        ]

    def curve(
        self, W: Tensor, bias: Tensor | None, metric: Metric, shapes: Sequence[Shape]
    ) -> list[float]:
        return error_curve(W, metric, [(shape.width, shape.rank) for shape in shapes])


def tensors_of(factors: Factors, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a `LowRankHeads` module, by their names in it. A bias b (H, d) becomes
    b gauge^-1.
    """
    tensors = {}
    if factors.W_shared.shape[1]:
        tensors["W_shared.weight"] = factors.W_shared.T  # (m, D)
        if factors.C is not None:
            tensors["C"] = factors.C  # (H, m, d)
    if factors.U.shape[2]:
        # (H r, D)
        tensors["U.weight"] = factors.U.transpose(1, 2).reshape(-1, factors.U.shape[1])
        tensors["B"] = factors.B  # (H, d, r)
    if bias is not None:
        tensors["bias"] = (
            bias
            if factors.gauge is None
            else torch.linalg.solve(factors.gauge.mT, bias.double().unsqueeze(-1)).squeeze(-1)
        )
    return tensors
