"""The frontier of perplexity against cache: many conversions of one model at several sizes, beside the methods of others, from one calibration.

Every method is a shape of the same factorisation (factorise.py), so all are converted, loaded and measured by the same code at the same bytes:

    lrkv       base as wide as a head and residuals: what `--rank` gives
    budget     the same family, widths and ranks planned per layer: what `--cache-ratio` gives
    per-head   residuals without a base (Palu M-LRD)
    grouped    one latent per group of heads (Palu G-LRD)
    latent     one latent for all heads (Palu J-LRD, the form of MLA)
    pooled     heads replaced by means of heads: multi-query and grouped-query attention
    mean       the plain mean as base, with residuals

A method may name its metric, as in `latent:whitened`, Palu's own. No method but budget differs between layers.
"""
import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .adapters import Geometry
from .allocate import allocate
from .calibrate import BUILT_IN, CalibratedLayer, Skeleton, Text, calibrated_layers, read_texts, window_length, windows
from .conversion import convert_layer, empty_target, open_model
from .errors import LrkvError
from .evaluate.compare import measure, text_windows
from .evaluate.load import load_model
from .factorise import UNALIGNED, group_count
from .metrics import METRICS, layer_metrics
from .plan import LayerPlan, Plan
from .report import converted_config
from .sensitivity import head_moments
from .survey import KEY_WEIGHT, curve, width_caps
from .writer import write_json

# method -> (base, (m, r) for n numbers cached per token and side, from n, H and d)
METHODS: dict[str, tuple[str, Callable[[int, int, int], tuple[int, int]]]] = {
    "lrkv": ("joint", lambda n, H, d: (d, (n - d) // H)),
    "per-head": ("joint", lambda n, H, d: (0, n // H)),
    "grouped": ("grouped", lambda n, H, d: (n // group_count(H) * group_count(H), 0)),
    "latent": ("joint", lambda n, H, d: (n, 0)),
    "pooled": ("pooled", lambda n, H, d: (n // d * d, 0)),
    "mean": ("mean", lambda n, H, d: (d, (n - d) // H)),
}
DEFAULT = ("budget", "lrkv", "latent:whitened", "per-head", "grouped:whitened", "pooled")


@dataclass(frozen=True)
class Outcome:
    """One conversion: `rank` is the lrkv rank whose bytes it matches; cache_ratio what it really caches."""

    method: str
    metric: str
    rank: int
    cache_ratio: float
    perplexity: float
    ratio: float
    kl: float


def sweep(model: str, ranks: list[int], text: Text, *, methods: list[str] = list(DEFAULT), calibration: list[str] | None = None,
          calibration_tokens: int = 16384, refit: bool = True, seq_len: int = 512, max_tokens: int | None = None, device: torch.device,
          progress: Callable[[str, int, int], None] = lambda *_: None) -> dict:
    """Convert `model` at every rank by every method in memory and measure each on `text`. Returns what `save` writes. Raises LrkvError.

    All layers' calibration is held in memory: this is for choosing on a model that fits there several times over.
    """
    checkpoint, adapter = open_model(model)
    geometry = adapter.geometry(checkpoint.config)
    chosen = [parse(name) for name in methods]
    ranks = sorted(set(ranks))
    if not ranks or not all(0 <= r <= geometry.head_dim for r in ranks):
        raise LrkvError(f"ranks {', '.join(map(str, ranks)) or '(none)'} are out of range", f"give some between 0 and the head width, {geometry.head_dim}")
    tokenizer = checkpoint.tokenizer()
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)[:max_tokens]
    batches = text_windows(ids, seq_len, 1)
    if not batches:
        raise LrkvError(f"the text {text.name} is empty or too short", "perplexity needs at least two tokens")
    skeleton = Skeleton(checkpoint, adapter, device)
    checkpoint.check(skeleton.expected())
    tokens = windows(read_texts([BUILT_IN] if calibration is None else calibration), tokenizer, window_length(checkpoint.config), calibration_tokens)
    moments = head_moments(skeleton, geometry, tokens, lambda done, total: progress("gradients", done, total))
    layers = []
    for layer in calibrated_layers(skeleton, geometry, tokens):
        layers.append(layer)
        progress("calibrating", layer.index + 1, geometry.layers)
    original = load_model(model, device, torch.float32)
    outcomes, total, base = [], len(ranks) * len(chosen), None
    for i, (rank, (method, metric)) in enumerate((r, m) for r in ranks for m in chosen):
        metrics = [layer_metrics(x.weights, geometry, metric, x.sums, moments[x.index]) for x in layers]
        plan = plan_for(method, rank, geometry, layers, metrics)
        converted = build(original, checkpoint, adapter, plan, layers, metrics, METHODS[method][0] if method != "budget" else "joint", refit)
        (base, other), predicted = measure([original, converted], batches)
        nll = [s.nll / predicted for s in (base, other)]
        outcomes.append(Outcome(method, metric, rank, plan.ratio, float(torch.tensor(nll[1]).exp()), float(torch.tensor(nll[1] - nll[0]).exp()), other.kl / predicted))
        progress("sweeping", i + 1, total)
    return {"model": checkpoint.source, "text": {"name": text.name, "sha256": text.sha256}, "tokens": predicted, "seq_len": seq_len, "refit": refit,
            "calibration_tokens": tokens.numel(), "base_perplexity": float(torch.tensor(base.nll / predicted).exp()),
            "knee": knee([o for o in outcomes if (o.method, o.metric) == chosen[0]]), "points": [asdict(o) for o in outcomes]}


def parse(name: str) -> tuple[str, str]:
    """"latent:whitened" -> ("latent", "whitened"). Raises LrkvError for a name that is neither."""
    method, _, metric = name.partition(":")
    metric = metric or "fisher"
    if method not in (*METHODS, "budget") or metric not in METRICS:
        raise LrkvError(f"unknown method {name!r}", f"methods: budget, {', '.join(METHODS)}; metrics: {', '.join(METRICS)}")
    return method, metric


def plan_for(method: str, rank: int, geometry: Geometry, layers: list[CalibratedLayer], metrics: list) -> Plan:
    """The plan of a method that caches no more than LRKV does at `rank`."""
    H, d = geometry.kv_heads, geometry.head_dim
    numbers = min(d + H * rank, H * d)
    if method == "budget":
        key_cap, value_cap = width_caps(geometry, None, None)
        curves = [(curve(x.weights.W_K, m.keys, geometry, key_cap, KEY_WEIGHT), curve(x.weights.W_V, m.values, geometry, value_cap, 1.0))
                  for x, m in zip(layers, metrics)]
        return allocate(curves, geometry, 4, numbers / (H * d))
    m, r = METHODS[method][1](numbers, H, d)
    return Plan(geometry, (LayerPlan(m, r, m, r),) * geometry.layers, 4)


def build(original: PreTrainedModel, checkpoint, adapter, plan: Plan, layers: list[CalibratedLayer], metrics: list, base: str, refit: bool) -> PreTrainedModel:
    """The converted model in memory; what the conversion leaves alone is shared with `original`."""
    model = empty_target(converted_config(checkpoint, adapter, plan, torch.float32, alignment=base not in UNALIGNED))
    state = dict(original.named_parameters())
    for layer, metric in zip(layers, metrics):
        prefix = adapter.module(layer.index)
        _, attention = convert_layer(layer, metric, plan.layers[layer.index], base, adapter, plan.geometry, model.get_submodule(prefix.rstrip(".")), refit)
        state |= {prefix + name: tensor.float() for name, tensor in attention.items()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in names}, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"never filled: {left[:3]}"
    return model.to(original.device).requires_grad_(False)


def knee(outcomes: list[Outcome]) -> float | None:
    """Cache ratio of the frontier's knee: the point farthest below the chord from end to end, both axes scaled to 1 (Kneedle, Satopaa et al. 2011)."""
    points = sorted(((o.cache_ratio, o.ratio) for o in outcomes))
    if len(points) < 3 or points[0][1] == points[-1][1]:
        return None
    (x0, y0), (x1, y1) = points[0], points[-1]
    below = [(1 - (x - x0) / (x1 - x0)) - (y - y1) / (y0 - y1) for x, y in points]
    best = max(range(len(points)), key=below.__getitem__)
    return points[best][0] if below[best] > 0 else None


def save(result: dict, folder: Path) -> list[Path]:
    """Write sweep.json, sweep.csv and, where matplotlib is installed, sweep.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", result)
    with open(folder / "sweep.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(result["points"][0]))
        writer.writeheader()
        writer.writerows(result["points"])
    try:
        from .plot import frontier
    except ImportError:
        return [folder / "sweep.json", folder / "sweep.csv"]
    frontier(result, folder / "sweep.png")
    return [folder / "sweep.json", folder / "sweep.csv", folder / "sweep.png"]
