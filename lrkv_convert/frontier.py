"""The frontier of perplexity against cache: many conversions of one model at several sizes, beside
the methods of others, from one calibration.

Every method is a shape of the same factorisation (fit/bases.py), so all are converted, loaded and
measured by the same code at the same bytes:

    lrkv       base as wide as a head and residuals: what `--rank` gives
    budget     the same family, widths and ranks planned per layer: what `--cache-ratio` gives
    per-head   residuals without a base (Palu M-LRD)
    grouped    one latent per group of heads (Palu G-LRD)
    latent     one latent for all heads (Palu J-LRD, the form of MLA)
    pooled     heads replaced by means of heads: multi-query and grouped-query attention
    mean       the plain mean as base, with residuals

A method may name its metric, as in `latent:whitened`, Palu's own. No method but budget differs
between layers.
"""

import csv
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .conversion import gather_texts, open_model, plan_budget
from .errors import LrkvError
from .evaluate.compare import positions_exceeded
from .evaluate.load import load_model
from .evaluate.perplexity import Candidate, measure, text_windows
from .examples.text import Text, check_ids, window_length, windows
from .families import Geometry
from .fit.bases import group_count
from .fit.layer import convert_layer, empty_target
from .fit.metric import METRICS
from .folder.companions import converted_config
from .folder.places import writing
from .folder.store import Store
from .folder.writer import write_json
from .observe.calibrate import calibrate, calibrated_layer
from .observe.sensitivity import gradient_rows, head_moments
from .plan.options import Options
from .plan.shapes import LayerPlan, Plan
from .source.skeleton import Skeleton

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
    """One conversion: `rank` is the lrkv rank whose bytes it matches; cache_ratio what it really
    caches.
    """

    method: str
    metric: str
    rank: int
    cache_ratio: float
    perplexity: float
    ratio: float
    kl: float


def sweep(
    model: str,
    ranks: list[int],
    text: Text,
    *,
    methods: Sequence[str] = tuple(DEFAULT),
    calibration: list[str] | None = None,
    calibration_tokens: int | None = None,
    refit: bool = True,
    seq_len: int = 512,
    max_tokens: int | None = None,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    each: Callable[[dict], object] = lambda result: None,
) -> dict:
    """Convert `model` at every rank by every method in memory and measure each on `text`. Returns
    what `save` writes. Raises LrkvError.

    The original and one rank's conversions are held in memory, in float32; what they do not change
    is shared. `each` is given the result so far after every rank, so that what was measured is not
    lost when a long sweep is stopped.
    """
    checkpoint, adapter = open_model(model)
    geometry = adapter.geometry(checkpoint.config)
    chosen = [parse(name) for name in methods]
    ranks = sorted(set(ranks))
    if not ranks or not all(0 <= r <= geometry.head_dim for r in ranks):
        raise LrkvError(
            f"ranks {', '.join(map(str, ranks)) or '(none)'} are out of range",
            f"give some between 0 and the head width, {geometry.head_dim}",
        )
    if limit := positions_exceeded(checkpoint.config, seq_len):
        raise LrkvError(
            f"windows of {seq_len} tokens are longer than {model} can read ({limit})",
            "give a smaller --seq-len",
        )
    tokenizer = checkpoint.tokenizer()
    ids = torch.tensor(
        tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"],
        dtype=torch.long,
    )[:max_tokens]
    batches = text_windows(ids, seq_len, 1)
    if not batches:
        raise LrkvError(
            f"the text {text.name} is empty or too short", "perplexity needs at least two tokens"
        )
    skeleton = Skeleton(checkpoint, adapter, device)
    # as many as a conversion reads
    wanted = Options(calibration=calibration, calibration_tokens=calibration_tokens).tokens
    tokens = windows(
        gather_texts(calibration, wanted, model, skeleton),
        tokenizer,
        window_length(checkpoint.config),
        wanted,
    )
    check_ids(torch.cat((ids, tokens.flatten())), checkpoint.config.vocab_size, model)
    original, rows = load_model(model, device, torch.float32), gradient_rows(tokens)
    outcomes, total = [], len(ranks) * len(chosen)
    with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
        store = Store(Path(folder), {})
        calibrate(
            skeleton,
            geometry,
            tokens,
            {"fisher"} | {metric for _, metric in chosen},
            store,
            rows,
            refit,
            lambda done, total: progress("calibrating", done, total),
        )
        head_moments(
            skeleton,
            geometry,
            tokens[rows],
            store,
            lambda done, total: progress("gradients", done, total),
        )
        for i, rank in enumerate(ranks):
            plans, models = [], []
            for j, (method, metric) in enumerate(chosen):
                plans.append(
                    budget_plan(rank, skeleton, geometry, store)
                    if method == "budget"
                    else matching_plan(method, rank, geometry)
                )
                models.append(
                    build(
                        original,
                        skeleton,
                        plans[-1],
                        metric,
                        store,
                        METHODS[method][0] if method != "budget" else "joint",
                        refit,
                    )
                )
                progress("sweeping", i * len(chosen) + j + 1, total)
            base, *scores = measure([Candidate(m) for m in (original, *models)], batches)
            for (method, metric), plan, other in zip(chosen, plans, scores):
                nll = other.mean("nll")
                outcomes.append(
                    Outcome(
                        method,
                        metric,
                        rank,
                        plan.ratio,
                        math.exp(nll),
                        math.exp(nll - base.mean("nll")),
                        other.mean("kl"),
                    )
                )
            result = {
                "model": checkpoint.source,
                "text": {"name": text.name, "sha256": text.sha256},
                "tokens": base.tokens,
                "seq_len": seq_len,
                "refit": refit,
                "calibration_tokens": tokens.numel(),
                "base_perplexity": math.exp(base.mean("nll")),
                "knee": knee([o for o in outcomes if (o.method, o.metric) == chosen[0]]),
                "points": [asdict(o) for o in outcomes],
            }
            each(result)
    return result


def parse(name: str) -> tuple[str, str]:
    """ "latent:whitened" -> ("latent", "whitened"). Raises LrkvError for a name that is neither."""
    method, _, metric = name.partition(":")
    metric = metric or "fisher"
    if method not in (*METHODS, "budget") or metric not in METRICS:
        raise LrkvError(
            f"unknown method {name!r}",
            f"methods: budget, {', '.join(METHODS)}; metrics: {', '.join(METRICS)}",
        )
    return method, metric


def matching_plan(method: str, rank: int, geometry: Geometry) -> Plan:
    """The plan of a method with one shape for all layers that caches no more than LRKV does at
    `rank`.
    """
    H, d = geometry.kv_heads, geometry.head_dim
    m, r = METHODS[method][1](min(d + H * rank, H * d), H, d)
    return Plan(geometry, (LayerPlan(m, r, m, r),) * geometry.layers, 4)


def budget_plan(rank: int, skeleton: Skeleton, geometry: Geometry, store: Store) -> Plan:
    """Widths and ranks per layer, in the bytes of LRKV at `rank`."""
    options = Options(cache_ratio=matching_plan("lrkv", rank, geometry).ratio)
    return plan_budget(skeleton, geometry, options, torch.float32, store, lambda *_: None)


def build(
    original: PreTrainedModel,
    skeleton: Skeleton,
    plan: Plan,
    metric: str,
    store: Store,
    base: str,
    refit: bool,
) -> PreTrainedModel:
    """The converted model in memory; what the conversion leaves alone is shared with `original`."""
    adapter = skeleton.adapter
    model = empty_target(converted_config(skeleton.checkpoint, adapter, plan, torch.float32, base))
    state = dict(original.named_parameters())
    for i in range(plan.geometry.layers):
        prefix, layer = adapter.module(i), calibrated_layer(skeleton, store, i)
        _, attention = convert_layer(
            layer,
            layer.metrics(plan.geometry, metric),
            plan,
            base,
            adapter,
            model.get_submodule(prefix.rstrip(".")),
            refit,
        )
        state |= {prefix + name: tensor.float() for name, tensor in attention.items()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(
        {name: tensor for name, tensor in state.items() if name in names}, strict=False, assign=True
    )
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"never filled: {left[:3]}"
    return model.to(original.device).requires_grad_(False)


def knee(outcomes: list[Outcome]) -> float | None:
    """Cache ratio of the frontier's knee: the point farthest below the chord from end to end, both
    axes scaled to 1 (Kneedle, Satopaa et al. 2011).
    """
    points = sorted((o.cache_ratio, o.ratio) for o in outcomes)
    if len(points) < 3 or points[0][1] == points[-1][1]:
        return None
    (x0, y0), (x1, y1) = points[0], points[-1]
    below = [(1 - (x - x0) / (x1 - x0)) - (y - y1) / (y0 - y1) for x, y in points]
    best = max(range(len(points)), key=below.__getitem__)
    return points[best][0] if below[best] > 0 else None


def save(result: dict, folder: Path) -> list[Path]:
    """Write sweep.json, sweep.csv and, where matplotlib is installed, sweep.png; returns what was
    written. Raises LrkvError.
    """
    with writing(folder):
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
    with writing(folder):
        frontier(result, folder / "sweep.png")
    return [folder / "sweep.json", folder / "sweep.csv", folder / "sweep.png"]
