"""From a calibrated layer to the tensors of its converted attention module."""

import torch
from torch import Tensor, nn

from ..device import give_back_memory
from ..observe.calibrate import Observed
from ..plan.shapes import Shape, key_base
from ..source.skeleton import empty
from .bases import BASES, Factors
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

    attention: that module; it is filled for the refit and emptied again.
    """
    weights, adapter, rotary = seen.weights, seen.site.adapter, seen.site.geometry.rotary
    # norms, the output's bias
    own = {name for name, _ in attention.named_parameters()}
    rest = {name: tensor for name, tensor in seen.rest.items() if name in own}
    if keys.form == "full":
        # (H d, D)
        factored, key_error = {"keys.U.weight": weights.W_K.transpose(1, 2).flatten(0, 1)}, 0.0
        if weights.b_K is not None:
            factored["keys.bias"] = weights.b_K
    else:
        fit = BASES[key_base(keys.form, base)](
            weights.W_K, metrics.keys, keys.width, keys.rank, rotary=rotary
        )
        if fit.gauge is not None:  # q (k gauge)^T = (q gauge^T) k^T
            weights = weights.replace(
                W_Q=torch.einsum("hgDe,hfe->hgDf", weights.W_Q.double(), fit.gauge),
                b_Q=(
                    None
                    if weights.b_Q is None
                    else torch.einsum("hge,hfe->hgf", weights.b_Q.double(), fit.gauge)
                ),
            )
        factored, key_error = side_tensors("keys", fit, weights.b_K), fit.error
    fit = BASES[base](weights.W_V, metrics.values, values.width, values.rank)
    if fit.gauge is not None:  # (v gauge) W_O = v (gauge W_O)
        weights = weights.replace(
            W_O=torch.einsum("hef,hgfD->hgeD", fit.gauge, weights.W_O.double())
        )
    factored |= side_tensors("values", fit, weights.b_V)
    errors = {"keys": key_error, "values": fit.error}
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


def side_tensors(side: str, factors: Factors, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of one `LowRankHeads` module, by their names in the attention module. A bias b
    becomes b gauge^-1.
    """
    tensors = {}
    if factors.W_shared.shape[1]:
        tensors["W_shared.weight"] = factors.W_shared.T  # (m, D)
        if factors.C is not None:
            # (H, m, d)
            tensors["C"] = factors.C
    if factors.U.shape[2]:
        # (H r, D)
        tensors["U.weight"] = factors.U.transpose(1, 2).reshape(-1, factors.U.shape[1])
        # (H, d, r)
        tensors["B"] = factors.B
    if bias is not None:
        tensors["bias"] = (
            bias
            if factors.gauge is None
            else torch.linalg.solve(factors.gauge.mT, bias.double().unsqueeze(-1)).squeeze(-1)
        )
    return {f"{side}.{name}": tensor for name, tensor in tensors.items()}
