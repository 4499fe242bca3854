"""Before a conversion: what every rank would cost, streamed layer by layer as a conversion is, of
each kind of attention.

What a rank would cost is predicted as KL(original || converted) in nats per token: half the squared
error of the fit in the Fisher metric, summed over layers, keys and values. Measured on other text
of the calibration's kind (benchmarks/NOTES.md), the divergence was 1.3 to 1.6 times that at uniform
ranks and 1.9 to 2.3 times in plans on SmolLM2-135M, 1.1 and 1.0 times on a 6M model: an estimate,
on the low side. It is no prediction of perplexity. Where a model reads well the loss rises by about
as much (SmolLM2, uniform: 0.9 to 1.2 times the prediction; plans: 1.2 to 1.9 times); where it reads
badly, to read differently is not to read worse (the 6M model at half its cache: predicted 0.33
nats, diverged 0.36, lost 0.06).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..device import pick_device
from ..errors import LrkvError
from ..examples.example import tokens_of
from ..examples.measured import MeasuredOn, described, examples_of
from ..families import Geometry, Site
from ..folder.store import Store
from ..observe.calibrate import solvable
from ..plan.allocate import Curve, allocate
from ..plan.curves import predicted_kl
from ..plan.options import Options
from ..plan.shapes import uniform_plan
from ..plan.spend import Budget
from ..study import Progress, Study
from .ablate import ablate
from .diversity import mean_diversity
from .spectra import LayerLook, Spectrum, look

# at most, and of speech half a conversion's: which rank costs what is settled long before the
# factors are
CALIBRATION_TOKENS = 8192
ABLATION_TOKENS = 1024
# nats per token: five per cent of perplexity on text that the model reads well
TARGET_KL = 0.05
# cache ratios that are tried for the recommendation
RATIOS = [n / 100 for n in range(10, 100, 5)]
SHARES = (0.9, 0.99)  # of a head's energy: how many dimensions hold them


@dataclass(frozen=True)
class Outlook:
    """One kind of attention before its conversion: its sites, in a stack of so many layers, the
    look at each, their (keys, values) curves for the planner, the ranks that are asked about, and
    bytes of a number stored.
    """

    sites: Sequence[Site]
    layers: int
    looks: Sequence[LayerLook]
    curves: Sequence[tuple[Curve, Curve]]
    ranks: Sequence[int]
    element_size: int

    def cache_ratio(self, rank: int) -> float:
        """Of what `convert --rank` plans."""
        return uniform_plan(self.sites, self.layers, 1, rank=rank, force=True).ratio

    def saves(self, rank: int) -> bool:
        return self.cache_ratio(rank) < 1

    def predicted_kl(self, rank: int) -> float:
        """Of what `convert --rank` plans, nats."""
        return sum(seen.predicted_kl(rank) for seen in self.looks)

    def planned_kl(self, ratio: float) -> float | None:
        """Of what `convert --cache-ratio` plans, nats; None below its floor."""
        return planned_kl(self.curves, self.sites, self.layers, self.element_size, ratio)


@solvable()
def ahead(
    model: str,
    ranks: list[int] | None,
    target_kl: float,
    calibration: list[str] | None,
    calibration_tokens: int | None,
    ablation: MeasuredOn,
    max_tokens: int | None,
    device: str,
    progress: Progress,
) -> dict:
    """What a conversion of `model` would cost; with something to measure on, also what its heads
    are worth. Arguments are those of `inspect`.
    """
    study = Study(model, progress=progress)
    options = Options(calibration=calibration, calibration_tokens=calibration_tokens)
    options.check(study.sites, study.config)
    asked = {kind: checked_ranks(ranks, sites[0].geometry) for kind, sites in study.by_kind.items()}
    wanted = max_tokens or ABLATION_TOKENS
    removed = ablation.read(model, study.family, wanted) if ablation else None
    skeleton = study.build(pick_device(device))
    wanted = min(CALIBRATION_TOKENS, options.tokens_of(study.family) // 2)
    material = study.gather(calibration, calibration_tokens or wanted)
    if not material:
        raise LrkvError(
            "without calibration text there is no gradient to predict a loss from",
            "give --calibration, or leave it out",
        )
    study.check()
    read = examples_of(removed, study.checkpoint, study.whole) if removed else None
    examples = study.read() or []
    with tempfile.TemporaryDirectory(prefix="lrkv-") as folder:
        store = Store(Path(folder), {})
        study.observe({"fisher"}, store, for_refit=False)
        outlooks = look_at(study, asked, store)
    result = {
        "model": model,
        "kind": "original",
        "notices": study.checkpoint.notices,
        "metric": "fisher",
        "calibration": {
            "texts": [
                {"name": t.name, "sha256": t.sha256} for t in (*material.texts, *material.corpora)
            ],
            "tokens": tokens_of(examples),
        },
        "recommended": recommended(list(outlooks.values()), target_kl),
        "attention": {kind: kind_row(outlook, target_kl) for kind, outlook in outlooks.items()},
    }
    if removed and read:
        sites = [site for outlook in outlooks.values() for site in outlook.sites]
        looks = [seen for outlook in outlooks.values() for seen in outlook.looks]
        found = ablate(
            skeleton, sites, looks, read, lambda done, total: progress("ablating", done, total)
        )
        for kind, row in found.items():
            result["attention"][kind]["ablation"] = {"text": described(removed), **row}
    return result


def look_at(study: Study, ranks: dict[str, list[int]], store: Store) -> dict[str, Outlook]:
    """The look at every site and its curves, by kind of attention. ranks: asked about, by kind."""
    found, done = {}, 0
    bits = Options().for_family(study.family).widths  # as `convert` plans by default
    element_size = study.stored_dtype("auto").itemsize
    for kind, sites in study.by_kind.items():
        looks = []
        for site in sites:
            looks.append(look(*study.look(store, "fisher", site), ranks[kind]))
            study.progress("looking", done := done + 1, len(study.sites))
        curves = study.curves(kind, "fisher", Budget(1.0).caps("joint"), "joint", store, bits)
        found[kind] = Outlook(sites, study.layers, looks, curves, ranks[kind], element_size)
    return found


def checked_ranks(ranks: list[int] | None, geometry: Geometry) -> list[int]:
    """Ascending; by default about eight from 0 to below break-even, in steps of a multiple of 4
    where heads are wide. Raises LrkvError.
    """
    H, d = geometry.kv_heads, geometry.head_dim
    if ranks is None:
        step = max(d // 8 // 4 * 4, 1) if d >= 32 else max(d // 8, 1)
        return [rank for rank in range(0, d, step) if d + H * rank < H * d]
    if bad := [rank for rank in ranks if not 0 <= rank <= d]:
        raise LrkvError(
            f"rank {bad[0]} is out of range", f"a rank lies between 0 and the head width, {d}"
        )
    return sorted(set(ranks))


def planned_kl(
    curves: Sequence[tuple[Curve, Curve]],
    sites: Sequence[Site],
    layers: int,
    element_size: int,
    ratio: float,
) -> float | None:
    """Predicted KL of what `convert --cache-ratio` plans of one kind of attention, in nats; None
    below its floor.
    """
    try:
        plan = allocate(curves, sites, layers, element_size, ratio)
    except LrkvError:
        return None
    return predicted_kl(curves, plan)


def kind_row(outlook: Outlook, target_kl: float) -> dict:
    """One kind of attention, as if it were converted alone."""
    sites = outlook.sites
    share = target_kl / len(sites) / 2
    return {
        "geometry": {"layers": outlook.layers, **asdict(sites[0].geometry)},
        "ranks": [rank_row(outlook, rank) for rank in outlook.ranks],
        "recommended": recommended([outlook], target_kl),
        "diversity": mean_diversity([seen.gram for seen in outlook.looks]),
        "layers": [
            layer_row(site.layer, seen, outlook, share) for site, seen in zip(sites, outlook.looks)
        ],
    }


def rank_row(outlook: Outlook, rank: int) -> dict:
    """One rank, uniform: cache, errors over layers, predicted KL, and that of a plan of the same
    bytes (None where nothing is saved).
    """

    def errors(side: str) -> dict:
        found = [getattr(seen, side).error(rank) for seen in outlook.looks]
        return {
            "mean": sum(found) / len(found),
            "worst": max(found),
            "worst_layer": outlook.sites[found.index(max(found))].layer,
        }

    ratio = outlook.cache_ratio(rank)
    return {
        "rank": rank,
        "cache_ratio": ratio,
        "keys": errors("keys"),
        "values": errors("values"),
        "predicted_kl": outlook.predicted_kl(rank),
        "planned_kl": outlook.planned_kl(ratio) if ratio < 1 else None,
    }


def recommended(outlooks: Sequence[Outlook], target_kl: float) -> dict:
    """The smallest of the ranks, and the smallest cache ratio, that save something and whose
    predicted KL is at most target_kl, these kinds of attention converted together. None: there is
    none.
    """

    def planned(ratio: float) -> float | None:
        found = [outlook.planned_kl(ratio) for outlook in outlooks]
        return None if None in found else sum(kl for kl in found if kl is not None)

    asked = sorted(set.intersection(*(set(outlook.ranks) for outlook in outlooks)))
    small = (
        rank
        for rank in asked
        if all(outlook.saves(rank) for outlook in outlooks)
        and sum(outlook.predicted_kl(rank) for outlook in outlooks) <= target_kl
    )
    ratio = next((r for r in RATIOS if (kl := planned(r)) is not None and kl <= target_kl), None)
    return {
        "target_kl": target_kl,
        "rank": next(small, None),
        "cache_ratio": ratio,
        "cache_ratio_kl": None if ratio is None else planned(ratio),
    }


def layer_row(i: int, seen: LayerLook, outlook: Outlook, target_kl: float) -> dict:
    """One layer. target_kl: the share of one of its sides."""

    def side(spectrum: Spectrum) -> dict:
        small = (
            r for r in outlook.ranks if outlook.saves(r) and spectrum.predicted_kl(r) <= target_kl
        )
        return {
            "base_share": spectrum.base_share,
            "rank": next(small, None),
            "energy": spectrum.total,
            "dimensions": {f"{share:.0%}": spectrum.dimensions(share).tolist() for share in SHARES},
            "outside_base": spectrum.outside.tolist(),
            "singular_values": spectrum.singular.tolist(),
            "errors": {str(r): spectrum.error(r) for r in outlook.ranks},
            "predicted_kl": {str(r): spectrum.predicted_kl(r) for r in outlook.ranks},
        }

    return {
        "layer": i,
        "keys": side(seen.keys),
        "values": side(seen.values),
        "diversity": mean_diversity([seen.gram]),
    }
