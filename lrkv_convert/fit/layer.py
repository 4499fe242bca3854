"""From a calibrated layer to the tensors of its converted attention module."""

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import give_back_memory
from ..families import Adapter
from ..modeling import CLASSES
from ..observe.calibrate import CalibratedLayer
from ..plan.shapes import Plan
from ..source.skeleton import empty
from .bases import BASES, Factors
from .metric import LayerMetrics
from .refit import NOTHING_LOST, refit_output


def empty_target(config) -> PreTrainedModel:
    """The converted model's own class, built without memory: its names and shapes are what must be
    written.
    """
    with init_empty_weights(include_buffers=False):
        return (
            CLASSES[config.model_type.removeprefix("lrkv_")][2](config).eval().requires_grad_(False)
        )


def tensor_shapes(
    model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a model's checkpoint; tied ones stand once. Of a model
    that was loaded what is tied indeed counts.
    """
    tied = set(model.all_tied_weights_keys)
    return {
        name: (tuple(p.shape), dtype)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in tied
    }


def convert_layer(
    layer: CalibratedLayer,
    metrics: LayerMetrics,
    plan: Plan,
    base: str,
    adapter: Adapter,
    attention: nn.Module,
    refit: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Fit errors of keys and values of one layer, and the tensors of its converted attention module
    by their names in it.

    attention: the module they belong to; it is filled for the refit and emptied again.
    """
    weights, shape, rotary = layer.weights, plan.layers[layer.index], plan.geometry.rotary
    # norms, the output's bias
    rest = {
        name: layer.rest[name] for name, _ in attention.named_parameters() if name in layer.rest
    }
    if plan.keys == "full":
        # (H d, D)
        factored, key_error = {"keys.U.weight": weights.W_K.transpose(1, 2).flatten(0, 1)}, 0.0
        if weights.b_K is not None:
            factored["keys.bias"] = weights.b_K
    else:
        fit = BASES[plan.key_base(base)](
            weights.W_K, metrics.keys, shape.key_width, shape.key_rank, rotary=rotary
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
    fit = BASES[base](weights.W_V, metrics.values, shape.value_width, shape.value_rank)
    if fit.gauge is not None:  # (v gauge) W_O = v (gauge W_O)
        weights = weights.replace(
            W_O=torch.einsum("hef,hgfD->hgeD", fit.gauge, weights.W_O.double())
        )
    factored, errors = (
        factored | side_tensors("values", fit, weights.b_V),
        {
            "keys": key_error,
            "values": fit.error,
        },
    )
    del fit
    give_back_memory()
    if refit and layer.inputs and max(errors.values()) > NOTHING_LOST:
        state = rest | adapter.join(weights) | factored
        attention.load_state_dict(
            {name: tensor.to(weights.W_O.device, torch.float32) for name, tensor in state.items()},
            assign=True,
        )
        weights = weights.replace(W_O=refit_output(layer, attention, adapter.output, weights.W_O))
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
