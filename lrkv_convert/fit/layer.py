"""From a calibrated layer to the tensors of its converted attention module."""

from typing import Any

import torch
from torch import Tensor, nn

from ..device import give_back_memory
from ..families import AttentionWeights
from ..forms import FORMS, Shape, of_values
from ..observe.calibrate import Observed
from ..source.skeleton import empty
from .metric import LayerMetrics
from .refit import NOTHING_LOST, refit_output


def fit_site(
    seen: Observed,
    metrics: LayerMetrics,
    keys: Shape,
    values: Shape,
    base: str,
    attention: nn.Module,
    refit: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Fit errors of keys and values of one attention module, and the tensors of the converted
    module by their names in it.

    attention: that module; it is filled for the refit and emptied again. What the fit found beside
    tensors stands in it afterwards (`found_in`).
    """
    weights, adapter, geometry = seen.weights, seen.site.adapter, seen.site.geometry
    # norms, the output's bias
    own = {name for name, _ in attention.named_parameters()}
    rest = {name: tensor for name, tensor in seen.rest.items() if name in own}
    fit = FORMS[keys.form].fit(
        weights.W_K, weights.b_K, metrics.side("keys", keys.coded), keys, geometry, base
    )
    errors, factored = {"keys": fit.error}, _named("keys", fit.tensors)
    _tell(attention.keys, fit.found)
    weights = weights if fit.gauge is None else _queries_absorb(weights, fit.gauge)
    fit = FORMS[values.form].fit(
        weights.W_V,
        weights.b_V,
        metrics.side("values", values.coded),
        values,
        of_values(geometry),
        base,
    )
    errors, factored = errors | {"values": fit.error}, factored | _named("values", fit.tensors)
    _tell(attention.values, fit.found)
    weights = weights if fit.gauge is None else _outputs_absorb(weights, fit.gauge)
    del fit
    give_back_memory()
    if refit and seen.inputs and max(errors.values()) > NOTHING_LOST:
        state = rest | adapter.join(weights) | factored
        attention.load_state_dict(
            {name: t.to(weights.W_O.device, torch.float32) for name, t in state.items()},
            assign=True,
        )
        weights = weights.replace(W_O=refit_output(seen, attention, adapter.output, weights.W_O))
        empty(attention)
    return errors, rest | adapter.join(weights) | factored


def found_in(attention: nn.Module) -> dict[str, dict]:
    """What the config must say of a converted attention module beside its shapes: of keys and of
    values, by name.
    """
    sides: dict[str, Any] = {"keys": attention.keys, "values": attention.values}
    return {
        side: {name: getattr(heads, name) for name in heads.found} for side, heads in sides.items()
    }


def _tell(heads: Any, found: dict) -> None:
    """Let a `LowRankHeads` know what its fit found."""
    for name, value in found.items():
        setattr(heads, name, value)


def _named(side: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{side}.{name}": tensor for name, tensor in tensors.items()}


def _queries_absorb(weights: AttentionWeights, gauge: Tensor) -> AttentionWeights:
    """q (k gauge)^T = (q gauge^T) k^T, gauge (H, d, d)."""
    return weights.replace(
        W_Q=torch.einsum("hgDe,hfe->hgDf", weights.W_Q.double(), gauge),
        b_Q=(
            None
            if weights.b_Q is None
            else torch.einsum("hge,hfe->hgf", weights.b_Q.double(), gauge)
        ),
    )


def _outputs_absorb(weights: AttentionWeights, gauge: Tensor) -> AttentionWeights:
    """(v gauge) W_O = v (gauge W_O), gauge (H, d, d)."""
    return weights.replace(W_O=torch.einsum("hef,hgfD->hgeD", gauge, weights.W_O.double()))
