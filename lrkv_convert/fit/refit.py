"""Closed-form refit of the output projection, once keys and values of a layer are truncated.

    W_O' = argmin sum_s || ô_s W_O' - o_s W_O ||^2 + ridge || W_O' - W_O ||^2

o_s, ô_s: concatenated head outputs of the original and of the converted attention on the same
calibration inputs. One solve per layer. It uses correlations between heads, which the per-head
metric cannot see.
"""

import torch
from torch import Tensor, nn

from ..observe.calibrate import Observed

RIDGE = 1e-2  # share of the mean eigenvalue of sum ô ô^T, pulling towards no change
# below this fitted error there is nothing to give back, and the rounding of activations would only
# add noise
NOTHING_LOST = 1e-6


@torch.no_grad()
def refit_output(
    seen: Observed, attention: nn.Module, output: str, W_O: Tensor, ridge: float = RIDGE
) -> Tensor:
    """The corrected output projection, (H, G, d, D) float64.

    attention: the converted module with its weights in place; output: the name of its output
    projection; W_O (H, G, d, D): the projection as it stands in the converted module (a gauge may
    already be in it).
    """
    converted: list[Tensor] = []
    hook = attention.get_submodule(output).register_forward_pre_hook(
        lambda module, args: converted.append(args[0])
    )
    n = W_O.shape[0] * W_O.shape[1] * W_O.shape[2]
    gram, cross = (torch.zeros(n, n, dtype=torch.float64, device=W_O.device) for _ in range(2))
    for x, arguments, original in seen.calls(W_O.device):
        attention(x, **arguments)
        # (windows T, H G d) each
        o, o_hat = original.flatten(0, 1), converted.pop().flatten(0, 1)
        gram += o_hat.T @ o_hat
        cross += o_hat.T @ o
    hook.remove()
    pull = ridge * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(pull)
    # (H G d, D)
    wanted = cross @ seen.weights.W_O.reshape(n, -1).double() + pull * W_O.reshape(n, -1).double()
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(gram)).view(W_O.shape)
