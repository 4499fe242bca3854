"""What a head is worth, and what would have told: functional ablation, an open question of arXiv
2601.11471.

The unit is the KV head with all query heads of its group, for that is what a cache holds. It is
removed by zeroing what it hands to the output projection. Every head is removed alone; then, for
each predictor, the 1, 2, 4, 8, ... heads that it ranks least, and most, of one kind of attention at
a time. The loss is measured each time, over the positions that count, and the divergence from the
whole model, which is the steadier of the two on few tokens.

    distinct        1 - mean |s_ij| with the other heads of the layer (diversity.py): what the
                    diversity metric would keep
    rank drop       how much the effective rank of the layer falls without the head
    energy keys     |A_h|^2 / 2 of its keys in the metric of the fit: predicted nats (spectra.py)
    energy values   the same of its values. Removing a head is to lose its values, so this is the
                    loss to second order
    own values      the part of it outside the shared base: what only the head itself can hold
    depth           minus the layer's number: what one would guess without looking

Unlike the rest of `lrkv inspect` this holds the whole model in memory, in float32. A removal is run
from its first layer on only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy
import torch
from scipy import stats
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..examples.example import IGNORED, Example, tokens_of
from ..families import Site, by_kind
from ..source.skeleton import Skeleton, first_of
from .diversity import diversity
from .spectra import LayerLook

Unit = tuple[int, int]  # (layer, KV head) of one kind of attention
SHUFFLES = 2000  # permutations within layers, for the p-value there
# the predictors by which several heads are removed
ORDERS = ("distinct", "energy keys", "energy values")
# orders beside those: a baseline, and the yardstick
RANDOM, MEASURED = "random", "measured alone"


def predictors(looks: Mapping[int, LayerLook], groups: int) -> dict[str, dict[Unit, float]]:
    """What each predictor says of every head of one kind of attention; more is worth more. looks:
    by layer; groups: query heads per KV head.
    """
    found: dict[str, dict[Unit, float]] = {
        name: {}
        for name in ("distinct", "rank drop", "energy keys", "energy values", "own values", "depth")
    }
    for i, layer in looks.items():
        n, whole = len(layer.gram), diversity(layer.gram) * len(layer.gram)
        for h, energy_keys in enumerate(layer.keys.energies.tolist()):
            own = torch.zeros(n, dtype=torch.bool)
            own[h * groups : (h + 1) * groups] = True
            rest = layer.gram[~own][:, ~own]
            energy, outside = layer.values.energies[h].item(), layer.values.outside[h].item()
            for name, value in (
                ("distinct", 1 - layer.gram[own][:, ~own].abs().mean().item()),
                ("rank drop", whole - diversity(rest) * len(rest)),
                ("energy keys", energy_keys / 2),
                ("energy values", energy / 2),
                ("own values", energy * outside / 2),
                ("depth", -i),
            ):
                found[name][i, h] = value
    return found


@dataclass(frozen=True)
class Effect:
    """Of removing heads: the loss with them gone less the loss of the whole model, and KL(whole ||
    without); nats per token.
    """

    increase: float
    kl: float


class WholeModel:
    """The original with all weights in place, its hidden states before every layer kept; a
    context. sites: whose heads may be removed.
    """

    def __init__(self, skeleton: Skeleton, sites: Sequence[Site], examples: Sequence[Example]):
        self.skeleton, self.examples = skeleton, examples
        self.sites = {(site.kind, site.layer): site for site in sites}
        self.targets = [
            example.predicts[example.predicts != IGNORED].to(skeleton.device)
            for example in examples
        ]

    @torch.no_grad()
    def __enter__(self) -> "WholeModel":
        self.stack, skeleton = ExitStack(), self.skeleton
        self.states = skeleton.encode(self.examples) or [None] * len(self.examples)
        hidden, self.call = skeleton.embed(self.examples)
        self.layers = [
            self.stack.enter_context(skeleton.layer(i)) for i in range(len(skeleton.layers))
        ]
        self.head = self.stack.enter_context(skeleton.head())
        self.entering = [hidden]
        for i in range(len(self.layers)):
            self.entering.append(self._layer(i, self.entering[-1]))
        self.logp = self._logp(self.entering[-1])
        self.loss = self._loss(self.logp)
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def _layer(self, i: int, hidden: list[Tensor]) -> list[Tensor]:
        """Hidden states (1, T, D) of every example before layer i -> after it."""
        found = []
        for h, states in zip(hidden, self.states):
            args, kwargs = self.call(i, h.shape[1], states)
            found.append(first_of(self.layers[i](h, *args, **kwargs)))
        return found

    def _logp(self, hidden: list[Tensor]) -> list[Tensor]:
        """Log-probabilities of every example at the positions that count, (n, vocabulary) each."""
        return [
            self.head(h, states)[0, (example.predicts != IGNORED).to(h.device)]
            .float()
            .log_softmax(-1)
            for example, h, states in zip(self.examples, hidden, self.states)
        ]

    def _mean(self, values: Iterable[Tensor]) -> float:
        """Over all positions that count, of values (n,) at those of every example."""
        total = torch.stack([value.double().sum() for value in values]).sum().item()
        return total / sum(map(len, self.targets))

    def _loss(self, logp: list[Tensor]) -> float:
        """Mean negative log-likelihood, nats per predicted token."""
        return -self._mean(
            p.gather(1, target.unsqueeze(1)) for p, target in zip(logp, self.targets)
        )

    @torch.no_grad()
    def without(self, kind: str, removed: Iterable[Unit]) -> Effect:
        """What happens without these KV heads of one kind of attention."""
        gone: dict[int, list[int]] = {}
        for layer, head in removed:
            gone.setdefault(layer, []).append(head)
        hidden = self.entering[min(gone)]
        for i in range(min(gone), len(self.layers)):
            hook = self._silence(self.sites[kind, i], gone[i]) if i in gone else None
            hidden = self._layer(i, hidden)
            if hook:
                hook.remove()
        logp = self._logp(hidden)
        kl = self._mean((p.exp() * (p - q)).sum(-1) for p, q in zip(self.logp, logp))
        return Effect(self._loss(logp) - self.loss, kl)

    def _silence(self, site: Site, heads: list[int]) -> RemovableHandle:
        """A hook that zeroes what these KV heads' groups hand to the output projection, (N, T, H G
        d).
        """
        g, adapter = site.geometry, site.adapter
        kept = torch.ones(g.kv_heads, device=self.skeleton.device)
        kept[heads] = 0
        attention = self.layers[site.layer].get_submodule(adapter.attention)
        return attention.get_submodule(adapter.output).register_forward_pre_hook(
            lambda module, args: (args[0] * kept.repeat_interleave(g.groups * g.head_dim),)
        )


def ablate(
    skeleton: Skeleton,
    sites: Sequence[Site],
    looks: Sequence[LayerLook],
    examples: Sequence[Example],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, dict]:
    """Remove heads and measure on examples. looks: at each of the sites. Returns, by kind of
    attention, the `ablation` part of the JSON (docs/inspect.md).
    """
    kinds: dict[str, dict[int, LayerLook]] = {}
    for site, seen in zip(sites, looks, strict=True):
        kinds.setdefault(site.kind, {})[site.layer] = seen
    geometries = {kind: found[0].geometry for kind, found in by_kind(sites).items()}
    said = {kind: predictors(kinds[kind], g.groups) for kind, g in geometries.items()}
    total, done = sum(_removals(values) for values in said.values()), 0

    def counted() -> None:
        nonlocal done
        progress(done := done + 1, total)

    with WholeModel(skeleton, sites, examples) as model:
        return {
            kind: {"tokens": tokens_of(examples), **_of_kind(model, kind, values, counted)}
            for kind, values in said.items()
        }


def _sizes(units: int) -> list[int]:
    """How many heads are removed together: 1, 2, 4, ... up to half of them."""
    return [2**k for k in range(16) if 2**k <= units // 2]


def _removals(said: dict[str, dict[Unit, float]]) -> int:
    """How often one kind of attention is run without heads; the first size is measured alone."""
    units = len(said["depth"])
    return units + 2 * (len(ORDERS) + 2) * max(0, len(_sizes(units)) - 1)


def _of_kind(
    model: WholeModel,
    kind: str,
    said: dict[str, dict[Unit, float]],
    counted: Callable[[], None],
) -> dict:
    """Loss, units, correlations and removals of one kind of attention. said: `predictors`."""
    units = list(said["depth"])
    sizes, alone = _sizes(len(units)), {}
    for unit in units:
        alone[unit] = model.without(kind, [unit])
        counted()
    drawn = torch.rand(len(units), generator=torch.Generator().manual_seed(0)).tolist()
    orders = {name: said[name] for name in ORDERS} | {
        MEASURED: {unit: effect.kl for unit, effect in alone.items()},
        RANDOM: dict(zip(units, drawn)),
    }
    removals = []
    for name, values in orders.items():
        ranked = sorted(units, key=values.__getitem__)
        for order, ends in (("least", ranked), ("most", ranked[::-1])):
            effects = [alone[ends[0]]]
            for size in sizes[1:]:
                effects.append(model.without(kind, ends[:size]))
                counted()
            removals.append(
                {
                    "predictor": name,
                    "order": order,
                    "heads": sizes,
                    "loss_increase": [e.increase for e in effects],
                    "kl": [e.kl for e in effects],
                }
            )
    return {
        "loss": model.loss,
        "units": [
            {
                "layer": i,
                "head": h,
                "loss_increase": alone[i, h].increase,
                "kl": alone[i, h].kl,
                "predictors": {name: values[i, h] for name, values in said.items()},
            }
            for i, h in units
        ],
        "correlations": [
            {"predictor": name, **correlation(values, alone)} for name, values in said.items()
        ],
        "removals": removals,
    }


def correlation(values: dict[Unit, float], alone: dict[Unit, Effect]) -> dict:
    """Spearman's rank correlation of a predictor with what removing each head alone did: rho and p
    against the loss, rho_kl and p_kl against the divergence, rho_within and p_within against the
    divergence among the heads of the same layer only. None where all values are equal.
    """
    said, loss, kl = (
        numpy.array([x[unit] for unit in alone])
        for x in (
            values,
            {u: e.increase for u, e in alone.items()},
            {u: e.kl for u, e in alone.items()},
        )
    )
    equal = len(set(said.tolist())) == 1 or len(alone) < 3
    (rho, p), (rho_kl, p_kl) = (
        (None, None) if equal else map(float, stats.spearmanr(said, effect))
        for effect in (loss, kl)
    )
    rho_within, p_within = within_layers(said, kl, numpy.array([layer for layer, _ in alone]))
    return {
        "rho": rho,
        "p": p,
        "rho_kl": rho_kl,
        "p_kl": p_kl,
        "rho_within": rho_within,
        "p_within": p_within,
    }


def within_layers(
    x: numpy.ndarray, y: numpy.ndarray, layer: numpy.ndarray
) -> tuple[float | None, float | None]:
    """Correlation of the ranks inside each layer, all layers together, and the share of shuffles
    within layers that reach it (two-sided).
    """
    members = [numpy.flatnonzero(layer == i) for i in numpy.unique(layer)]

    def ranks(values: numpy.ndarray) -> numpy.ndarray:
        out = numpy.zeros(len(values))
        for where in members:
            out[where] = stats.rankdata(values[where]) - (len(where) + 1) / 2
        return out

    a, b = ranks(x), ranks(y)
    size = float(numpy.sqrt((a @ a) * (b @ b)))
    if not size:
        return None, None
    draw, rho, extreme = numpy.random.default_rng(0), float(a @ b / size), 0
    for _ in range(SHUFFLES):
        shuffled = b.copy()
        for where in members:
            shuffled[where] = b[draw.permutation(where)]
        extreme += abs(a @ shuffled) / size >= abs(rho) - 1e-12
    return rho, float((extreme + 1) / (SHUFFLES + 1))
