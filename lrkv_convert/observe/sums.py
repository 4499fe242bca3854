"""Second moments of what a layer reads and attends to, summed over the examples: what its metrics
(fit/metric.py) are made of.

In cross-attention T decoder tokens attend to S encoder positions x_s. What changes:

    keys     Sigma_K = sum_s w_s x_s x_s^T      w_s: attention mass that encoder position s
                                                receives from all decoder tokens and heads
    values   Sigma_V = sum_t z_t z_t^T          z_t = sum_s a_ts x_s, for every head

All are means per decoder token, which is what the loss is a mean over, so that errors of keys and
values, and of layers, compare.

Shapes: H KV heads, G queries per KV head, D width, d head width, T tokens.
"""

from collections.abc import Callable, Collection
from typing import cast

import torch
from torch import Tensor

from ..families import AttentionWeights, Geometry
from ..fit.metric import ATTENDED, head_basis, run_count, runs

# leading tokens of an example that may be sinks: they are not counted among usual ones
SINKS = 4


class MetricSums:
    """Accumulates one layer's second moments over windows of (input, attention): those that the
    wanted metrics need, the others are None.

    inputs, keys, values (D, D) float64: sum x x^T, sum w x x^T, sum z z^T; heads (runs, k, k)
    float32: sum z z^T of each run of heads alone, in the coordinates of `head_basis`
    (`Metric.grams`): orthonormal ones, so that rounding stays below what shrinkage adds; queries
    (H, d, d) float64: sum q q^T over the group; tokens: their count.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        geometry: Geometry,
        wanted: Collection[str],
        device: torch.device,
    ):
        H, D, d = geometry.kv_heads, geometry.width, geometry.head_dim
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        attended = not ATTENDED.isdisjoint(wanted)
        self.inputs = zeros(D, D) if "whitened" in wanted else None
        self.keys, self.values = (zeros(D, D), zeros(D, D)) if attended else (None, None)
        self.runs = (
            [
                slice(part.start * geometry.groups, part.stop * geometry.groups)
                for part in runs(H, count)
            ]
            if attended and (count := run_count(geometry))
            else []
        )
        self.basis = head_basis(weights.W_V.to(device)).float() if self.runs else None
        self.heads = (
            torch.zeros(len(self.runs), *self.basis.shape[1:] * 2, device=device)
            if self.basis is not None
            else None
        )
        self.queries, self.tokens = zeros(H, d, d) if "attention" in wanted else None, 0
        self.weights = (
            weights.replace(W_K=None, W_V=None, W_O=None).to(device, torch.float32)
            if self.queries is not None
            else None
        )

    def add(self, x: Tensor, attention: Tensor, states: Tensor | None = None) -> None:
        """x (T, D): input of the attention module; attention (H G, T, S): its weights; states
        (S, D): what it attends to, None for x itself, causally. float32 products, float64 sums.
        """
        self.tokens += x.shape[0]
        gram = causal_gram if states is None else plain_gram
        seen = x if states is None else states
        if self.inputs is not None:
            share = x.shape[0] / len(seen)  # 1, but in cross-attention: per decoder token
            self.inputs += seen.T @ seen * share  # (D, D)
        if self.keys is not None and self.values is not None:
            self.keys += seen.T @ (attention.sum((0, 1)).unsqueeze(1) * seen)  # (D, D)
            # (D, D): sum_h Z_h^T Z_h, Z_h = A_h X
            self.values += seen.T @ (self.add_heads(seen, attention, gram) @ seen)
        self.add_queries(x)

    def add_heads(
        self, states: Tensor, attention: Tensor, gram: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """states (S, D): what is attended to; attention (H G, T, S); gram: sum_h A_h^T A_h (S, S)
        of some heads. Returns that of all.
        """
        if self.basis is None or self.heads is None:
            return gram(attention)
        states, total = states @ self.basis, 0  # (S, k)
        for i, heads in enumerate(self.runs):
            part = gram(attention[heads])
            self.heads[i] += states.T @ (part @ states)
            total = total + part
        return cast(Tensor, total)

    def add_queries(self, x: Tensor) -> None:
        """x (T, D): input of the attention module."""
        if self.queries is not None and self.weights is not None:
            # (H, G, T, d)
            q = torch.einsum("td,hgde->hgte", x, self.weights.W_Q)
            if self.weights.b_Q is not None:
                q = q + self.weights.b_Q.unsqueeze(2)
            # (H, d, d)
            self.queries += torch.einsum("hgte,hgtf->hef", q, q)

    def state(self) -> dict:
        """The sums alone, as plain float32 tensors: what shrinkage adds is far above their
        rounding.
        """
        sums = {
            name: getattr(self, name) for name in ("inputs", "keys", "values", "heads", "queries")
        }
        return {
            "tokens": self.tokens,
            **{name: value if value is None else value.float() for name, value in sums.items()},
        }


class SpreadSums:
    """Accumulates how the inputs of one layer lie (fit/codes.py): of usual tokens and, apart, of
    the first of each example.
    """

    def __init__(self, geometry: Geometry, device: torch.device):
        H, D = geometry.kv_heads, geometry.width
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares, self.total, self.first, self.shares = (
            zeros(D, D),
            zeros(D),
            zeros(D),
            zeros(H),
        )
        self.tokens, self.examples, self.queries = 0, 0, 0

    def add(self, x: Tensor, attention: Tensor, states: Tensor | None = None) -> None:
        """As `MetricSums.add`."""
        seen = x if states is None else states
        first = SINKS if len(seen) > 2 * SINKS else 0  # short examples have no others
        usual = seen[first:]
        self.squares += usual.T @ usual
        self.total += usual.sum(0)
        self.first += seen[0]
        squares = attention[..., first:].square().sum((1, 2))  # (H G,)
        self.shares += squares.view(len(self.shares), -1).mean(1)
        self.tokens += len(usual)
        self.queries += len(x)
        self.examples += 1

    def state(self) -> dict:
        """Mean, covariance and so on, as `Spread` takes them."""
        mean = self.total / self.tokens
        return {
            "mean": mean,
            "first": self.first / self.examples,
            "covariance": self.squares / self.tokens - mean.unsqueeze(1) * mean,
            "shares": self.shares / self.queries,
        }


def causal_gram(attention: Tensor, blocks: int = 8) -> Tensor:
    """sum_h A_h^T A_h (T, T) of causal attention weights (heads, T, T), without the products of
    zeros above the diagonal.
    """
    T = attention.shape[-1]
    gram = attention.new_zeros(T, T)
    for rows in torch.arange(T).tensor_split(blocks):
        if not len(rows):
            continue
        end = int(rows[-1]) + 1
        # (heads rows, end)
        part = attention[:, end - len(rows) : end, :end].reshape(-1, end)
        gram[:end, :end] += part.T @ part
    return gram


def plain_gram(attention: Tensor) -> Tensor:
    """sum_h A_h^T A_h (S, S) of attention weights (heads, T, S)."""
    every = attention.flatten(0, 1)
    return every.T @ every
