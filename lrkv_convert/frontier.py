"""The frontier of perplexity against cache: many conversions of one model at several sizes, beside
the methods of others, from one calibration.

Every method is a shape of the same factorisation (fit/bases.py), so all are converted, loaded and
measured by the same code at the same bytes:

    lrkv       base as wide as a head and residuals: what `--rank` gives
    budget     the same family, widths and ranks planned per layer: `--cache-ratio --bits 16`
    codes      latents of a few bits each, planned: what `--cache-ratio` gives
    per-head   residuals without a base (Palu M-LRD)
    grouped    one latent per group of heads (Palu G-LRD)
    latent     one latent for all heads (Palu J-LRD, the form of MLA)
    pooled     heads replaced by means of heads: multi-query and grouped-query attention
    mean       the plain mean as base, with residuals

A method may name its metric, as in `latent:whitened`, Palu's own. No method but budget and codes
differs between layers. Of an encoder-decoder both kinds of attention are converted, at the same
rank or ratio. Bytes are shares of a 16-bit cache.
"""

import csv
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .conversion import plan_budgets
from .errors import LrkvError
from .evaluate.load import load_model
from .evaluate.perplexity import Candidate, EncoderStates, measure, text_windows
from .evaluate.positions import positions_exceeded
from .examples.example import Example, tokens_of
from .examples.measured import MeasuredOn, described, examples_of
from .examples.text import Text, check_ids
from .families import Geometry, Site
from .fit.bases import group_count
from .fit.layer import fit_site
from .fit.metric import METRICS
from .folder.companions import converted_config
from .folder.places import writing
from .folder.store import Store
from .folder.target import empty_target
from .folder.writer import write_json
from .modeling import auto_class
from .plan.options import Options
from .plan.shapes import Plan, Shape, SitePlan
from .study import Progress, Study

SEQ_LEN = 512  # window of text

# method -> (base, (m, r) for n numbers cached per token and side, from n, H and d)
METHODS: dict[str, tuple[str, Callable[[int, int, int], tuple[int, int]]]] = {
    "lrkv": ("joint", lambda n, H, d: (d, (n - d) // H)),
    "per-head": ("joint", lambda n, H, d: (0, n // H)),
    "grouped": ("grouped", lambda n, H, d: (n // group_count(H) * group_count(H), 0)),
    "latent": ("joint", lambda n, H, d: (n, 0)),
    "pooled": ("pooled", lambda n, H, d: (n // d * d, 0)),
    "mean": ("mean", lambda n, H, d: (d, (n - d) // H)),
}
PLANNED = ("budget", "codes")
DEFAULT = ("codes", "budget", "lrkv", "latent:whitened", "per-head", "grouped:whitened", "pooled")


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
    text: Text | None = None,
    *,
    pairs: str | None = None,
    audio: str | None = None,
    methods: Sequence[str] | None = None,
    bits: str = "auto",
    calibration: list[str] | None = None,
    calibration_tokens: int | None = None,
    refit: bool = True,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    device: torch.device,
    progress: Progress = lambda *_: None,
    each: Callable[[dict], object] = lambda result: None,
) -> dict:
    """Convert `model` at every rank by every method in memory and measure each on `text`, in
    windows of `seq_len` tokens (default: SEQ_LEN); of an encoder-decoder on `pairs` or `audio`.
    methods: by default DEFAULT, without codes where the model's cache takes none; bits: of codes,
    as `lrkv convert --bits` takes them. Returns what `save` writes. Raises LrkvError.

    The original and one rank's conversions are held in memory, in float32; what they do not change
    is shared. `each` is given the result so far after every rank, so that what was measured is not
    lost when a long sweep is stopped.
    """
    study, ranks = Study(model, progress=progress), sorted(set(ranks))
    methods = default_methods(study) if methods is None else methods
    chosen = [parse(m) for m in methods]
    check_methods(study, chosen, bits)
    given = MeasuredOn(text, pairs, audio)
    material = given.read(model, study.family, max_tokens or sys.maxsize)
    if study.family.encoder is None:
        seq_len = seq_len or SEQ_LEN
    elif seq_len is not None:
        raise LrkvError("--seq-len does not go with --audio and --pairs", "leave it out")
    check_ranks(ranks, study.sites)
    examples = windows_to_read(text, study, seq_len, max_tokens) if text and seq_len else []
    study.build(device)
    # as many as a conversion reads
    wanted = Options(calibration=calibration, calibration_tokens=calibration_tokens)
    study.gather(calibration, wanted.tokens_of(study.family))
    study.check()
    if not study.read():
        raise LrkvError("a sweep fits on calibration text, and there is none", "give --calibration")
    original = load_model(model, device, torch.float32, auto_class(study.family.model_type))
    writing_own = lambda done, total: progress("writing", done, total)
    examples = examples or examples_of(material, study.checkpoint, study.whole, writing_own)
    states = EncoderStates(original) if study.family.encoder else None  # all have the same
    outcomes, total = [], len(ranks) * len(chosen)
    with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
        store = Store(Path(folder), {})
        study.observe({"fisher"} | {metric for _, metric in chosen}, store, refit)
        for i, rank in enumerate(ranks):
            plans, models = [], []
            for j, (method, metric) in enumerate(chosen):
                plans.append(plans_of(method, rank, study, store, bits))
                base = "joint" if method in PLANNED else METHODS[method][0]
                models.append(build(original, study, plans[-1], metric, store, base, refit))
                progress("sweeping", i * len(chosen) + j + 1, total)
            candidates = [Candidate(each, encoder=states) for each in (original, *models)]
            first, *scores = measure(candidates, examples)
            for (method, metric), plan, other in zip(chosen, plans, scores):
                nll = other.mean("nll")
                outcomes.append(
                    Outcome(
                        method,
                        metric,
                        rank,
                        ratio_of(plan),
                        math.exp(nll),
                        math.exp(nll - first.mean("nll")),
                        other.mean("kl"),
                    )
                )
            result = {
                "model": study.checkpoint.source,
                "notices": study.checkpoint.notices,
                "text": described(material),
                "tokens": first.tokens,
                "seq_len": seq_len,
                "attention": list(study.kinds),
                "refit": refit,
                "bits": bits if any(method == "codes" for method, _ in chosen) else None,
                "calibration_tokens": tokens_of(study.examples or []),
                "base_perplexity": math.exp(first.mean("nll")),
                "knee": knee([o for o in outcomes if (o.method, o.metric) == chosen[0]]),
                "points": [asdict(o) for o in outcomes],
            }
            each(result)
    return result


def windows_to_read(
    text: Text, study: Study, seq_len: int, max_tokens: int | None
) -> list[Example]:
    """Windows of a text, one after the other. Raises LrkvError."""
    checkpoint = study.checkpoint
    if limit := positions_exceeded(checkpoint.config, seq_len):
        raise LrkvError(
            f"windows of {seq_len} tokens are longer than {study.model} can read ({limit})",
            "give a smaller --seq-len",
        )
    ids = torch.tensor(
        checkpoint.tokenizer()(text.content, add_special_tokens=False, verbose=False)["input_ids"],
        dtype=torch.long,
    )[:max_tokens]
    examples = text_windows(ids, seq_len)
    if not examples:
        raise LrkvError(
            f"the text {text.name} is empty or too short", "perplexity needs at least two tokens"
        )
    check_ids(ids, checkpoint.config.vocab_size, study.model)
    return examples


def check_ranks(ranks: Sequence[int], sites: Sequence[Site]) -> None:
    """Raise LrkvError for ranks that heads do not have."""
    widest = min(site.geometry.head_dim for site in sites)
    if not ranks or not all(0 <= r <= widest for r in ranks):
        raise LrkvError(
            f"ranks {', '.join(map(str, ranks)) or '(none)'} are out of range",
            f"give some between 0 and the head width, {widest}",
        )


def parse(name: str) -> tuple[str, str]:
    """ "latent:whitened" -> ("latent", "whitened"). Raises LrkvError for a name that is neither."""
    method, _, metric = name.partition(":")
    metric = metric or "fisher"
    if method not in (*METHODS, *PLANNED) or metric not in METRICS:
        raise LrkvError(
            f"unknown method {name!r}",
            f"methods: {', '.join((*PLANNED, *METHODS))}; metrics: {', '.join(METRICS)}",
        )
    if method == "codes" and metric != "fisher":
        raise LrkvError(
            f"codes are planned and fitted by the gradient of the loss, not in the {metric} metric",
            "leave the metric of codes out",
        )
    return method, metric


def default_methods(study: Study) -> Sequence[str]:
    """What is swept when nothing is asked for."""
    coded = Options().for_family(study.family).widths is not None
    return [method for method in DEFAULT if coded or method != "codes"]


def check_methods(study: Study, chosen: list[tuple[str, str]], bits: str = "auto") -> None:
    """Raise LrkvError for a metric that says nothing of this model, as a conversion does, and for
    codes of bits that cannot be.
    """
    for metric in dict.fromkeys(metric for _, metric in chosen):
        Options(metric=metric, rank=0).check(study.sites, study.config)
    if any(method == "codes" for method, _ in chosen):
        coded_options(0.5, bits).check(study.sites, study.config)


def coded_options(ratio: float, bits: str) -> Options:
    """A budget of codes, whose widths are named so that a model without codes is refused. Raises
    LrkvError for bits that are none of codes.
    """
    options = Options(cache_ratio=ratio, bits=bits)
    if options.widths is None:
        raise LrkvError(f"codes have fewer bits than {bits}", "--methods budget is of 16 bits")
    return Options(cache_ratio=ratio, bits=",".join(map(str, options.widths)))


def matching_shape(method: str, rank: int, geometry: Geometry) -> Shape:
    """The shape of a method that caches no more than LRKV does at `rank`, for either side."""
    H, d = geometry.kv_heads, geometry.head_dim
    return Shape(*METHODS[method][1](min(d + H * rank, H * d), H, d))


def matching_plan(method: str, rank: int, sites: Sequence[Site], layers: int) -> Plan:
    """The plan of a method with one shape for all modules of a kind of attention."""
    planned = (
        SitePlan(site.layer, site.geometry, shape, shape)
        for site in sites
        for shape in [matching_shape(method, rank, site.geometry)]
    )
    return Plan(tuple(planned), 4, layers)


def plans_of(
    method: str, rank: int, study: Study, store: Store, bits: str = "auto"
) -> dict[str, Plan]:
    """The plans of all kinds of attention in the bytes of LRKV at `rank`, 16 bits a number; bits:
    of codes.
    """
    same = "lrkv" if method in PLANNED else method
    plans = {
        kind: matching_plan(same, rank, sites, study.layers)
        for kind, sites in study.by_kind.items()
    }
    if method == "codes":
        return plan_budgets(study, coded_options(ratio_of(plans), bits), torch.bfloat16, store)
    if method == "budget":
        options = Options(cache_ratio=ratio_of(plans), bits="16")
        return plan_budgets(study, options, torch.float32, store)
    return plans


def ratio_of(plans: dict[str, Plan]) -> float:
    """Bytes cached, as a share of the original's, all kinds of attention together."""
    return sum(p.bytes_after for p in plans.values()) / sum(p.bytes_before for p in plans.values())


def build(
    original: PreTrainedModel,
    study: Study,
    plans: dict[str, Plan],
    metric: str,
    store: Store,
    base: str,
    refit: bool,
) -> PreTrainedModel:
    """The converted model in memory; what the conversion leaves alone is shared with `original`."""
    config = converted_config(study.checkpoint, study.family, plans, torch.float32, base)
    # with buffers that are stored, such as Marian's bias of the logits
    model, state = empty_target(config), original.state_dict()
    for site in study.sites:
        planned = next(p for p in plans[site.kind].sites if p.layer == site.layer)
        seen = study.seen(store, site)
        _, attention = fit_site(
            seen,
            seen.metrics(metric),
            planned.keys,
            planned.values,
            base,
            model.get_submodule(site.path),
            refit,
        )
        state |= {f"{site.path}.{name}": tensor.float() for name, tensor in attention.items()}
    names = model.state_dict().keys()
    model.load_state_dict(
        {name: tensor for name, tensor in state.items() if name in names}, strict=False, assign=True
    )
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"never filled: {left[:3]}"
    # transformers wraps `to`, and loses `self` for the checker
    model.to(original.device)  # pyright: ignore[reportArgumentType]
    return model.requires_grad_(False)


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
