"""What a user may ask of a conversion, and which wishes contradict one another. Checked before
anything is read in full.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import LrkvError
from ..families import KINDS, Family, Site
from ..fit.bases import BASES
from ..fit.metric import METRICS
from ..forms import form_named
from ..settings.fields import Typed
from .shapes import Plan, uniform_plan

# more helps most where the text is unlike what the model will read (benchmarks/NOTES.md)
TOKENS, BUILT_IN_TOKENS = 16384, 32768
SPEECH_TOKENS = 4096  # of transcripts: about 20 minutes of speech


@dataclass(frozen=True)
class Options(Typed):
    """How to convert. The defaults halve the cache. Raises LrkvError for a value of the wrong type.

    cache_ratio: byte budget, as a share of the original cache, spent over layers, keys and values
    where the loss minds most (default: 0.5, with full keys 0.75); max_width_k, max_width_v: how
    wide its bases may be (default: one head for keys under RoPE, four otherwise). rank, rank_k,
    rank_v: the same residual rank in every layer instead; base_width, base_width_k, base_width_v:
    width of the base then (default: one head). keys: the form in which keys are cached
    (forms.FORMS). base: how the base is found (fit/bases.py). metric: in which norm
    (fit/metric.py). refit: correct W_O in closed form afterwards; needs calibration text.
    calibration: text files or folders, "self" for text sampled from the model, [] or "none" for
    none, None for the text that ships with the package; for encoder-decoders what examples/pairs.py
    reads. calibration_tokens: how much of it is read (default: BUILT_IN_TOKENS of that text, TOKENS
    of any other). dtype: of the output, "auto" keeps the source's. force: allow a cache that does
    not shrink. recipe: name to record. attention: "self", "cross" or "self,cross": which attention
    of an encoder-decoder's decoder (default: both; each has a cache, a budget and a plan of its
    own); decoder-only models have self-attention alone.
    """

    cache_ratio: float | None = None
    rank: int | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    base_width: int | None = None
    base_width_k: int | None = None
    base_width_v: int | None = None
    max_width_k: int | None = None
    max_width_v: int | None = None
    keys: str = "joint"
    base: str = "joint"
    metric: str = "fisher"
    refit: bool = True
    calibration: list[str] | None = None
    calibration_tokens: int | None = None
    dtype: str = "auto"
    max_shard_size: int | str = "5GB"
    force: bool = False
    recipe: str | None = None
    attention: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.calibration == ["none"]:
            object.__setattr__(self, "calibration", [])

    @property
    def uniform(self) -> dict:
        """The options that give every layer the same shape, as `uniform_plan` takes them."""
        return {
            "rank": self.rank,
            "rank_k": self.rank_k,
            "rank_v": self.rank_v,
            "width": self.base_width,
            "width_k": self.base_width_k,
            "width_v": self.base_width_v,
        }

    def tokens_of(self, family: Family) -> int:
        """Tokens of calibration to read."""
        if self.calibration_tokens is not None:
            return self.calibration_tokens
        if family.speech:
            return SPEECH_TOKENS
        return BUILT_IN_TOKENS if self.calibration is None and family.encoder is None else TOKENS

    @property
    def without_text(self) -> bool:
        return self.calibration is not None and not len(self.calibration)

    @property
    def budget(self) -> float | None:
        """The byte budget as a share of the original cache; None for the same shape in every
        layer.
        """
        planned = self.base == "joint" and self.metric == "fisher" and not self.without_text
        if (
            self.cache_ratio is not None
            or not planned
            or any(value is not None for value in self.uniform.values())
        ):
            return self.cache_ratio
        return form_named(self.keys).budget

    def kinds(self, family: Family) -> tuple[str, ...]:
        """The kinds of attention to convert. Raises LrkvError for one that does not exist, or that
        this model has not.
        """
        asked = (
            [kind.strip() for kind in self.attention.split(",")]
            if self.attention is not None
            else list(family.kinds)
        )
        if unknown := [kind for kind in asked if kind not in KINDS]:
            raise LrkvError(
                f"unknown attention {unknown[0]!r}", "choose self, cross, or self,cross for both"
            )
        if unknown := [kind for kind in asked if kind not in family.kinds]:
            raise LrkvError(
                f"this model has no {unknown[0]}-attention",
                "it is a decoder alone: leave --attention out",
            )
        return tuple(kind for kind in KINDS if kind in asked)

    def check(self, sites: Sequence[Site], config) -> None:
        """Raise LrkvError for values out of range and for options that contradict one another."""
        for value, known, name in ((self.base, BASES, "base"), (self.metric, METRICS, "metric")):
            if value not in known:
                raise LrkvError(f"unknown {name} {value!r}", f"choose from {', '.join(known)}")
        geometries = list(dict.fromkeys(site.geometry for site in sites))
        form_named(self.keys).check(geometries, self.base, config)
        if self.cache_ratio is not None:
            self._check_budget()
        if self.metric == "whitened" and self.without_text:
            raise LrkvError(
                "the whitened metric is made of calibration text, and there is none",
                "give --calibration, or another --metric",
            )
        if any(width is not None and width < 1 for width in (self.max_width_k, self.max_width_v)):
            raise LrkvError(
                "the widest base is at least 1 wide", "see --max-width-k and --max-width-v"
            )
        if self.metric == "attention" and any(g.key_norm for g in geometries):
            raise LrkvError(
                "the attention metric knows nothing of QK-norm, which this model has",
                "leave --metric out, or take whitened or plain",
            )
        if self.max_width_k is not None and not form_named(self.keys).sized:
            raise LrkvError(
                f"--keys {self.keys} says already how wide keys are", "leave --max-width-k out"
            )
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise LrkvError(
                f"{self.calibration_tokens} calibration tokens are none",
                "give --calibration none for the weights alone",
            )
        if self.budget is None and (self.max_width_k or self.max_width_v):
            raise LrkvError(
                "the widest base is a limit of --cache-ratio, and there is none here",
                "with --rank, give --base-width",
            )

    def _check_budget(self) -> None:
        if any(value is not None for value in self.uniform.values()):
            raise LrkvError(
                "a cache ratio and ranks or base widths exclude each other",
                "give --cache-ratio, or --rank with --base-width",
            )
        if not 0 < self.cache_ratio < 1:
            raise LrkvError(
                f"a cache ratio of {self.cache_ratio} is out of range", "it lies between 0 and 1"
            )
        if self.base != "joint":
            raise LrkvError(
                f"a cache ratio plans the joint base only, not {self.base}",
                "give --rank with the other bases",
            )
        if self.metric != "fisher" or self.without_text:
            raise LrkvError(
                "a cache ratio compares layers by the gradient of the loss, on calibration text",
                "give --rank without text or with other metrics",
            )

    def uniform_plan(self, sites: Sequence[Site], layers: int, element_size: int) -> Plan | None:
        """The plan of one kind of attention, where it is the same in every layer; None where it
        waits for calibration. Raises LrkvError for shapes that cannot be.
        """
        if self.budget is not None:
            return None
        plan = uniform_plan(
            sites, layers, element_size, **self.uniform, keys=self.keys, force=self.force
        )
        site = plan.sites[0]
        try:
            for form, shape, geometry in reversed(site.sides):
                form.check_shape(shape, geometry, self.base)
        except ValueError as error:
            raise LrkvError(str(error), "see --base-width and --rank") from error
        return plan

    def record(self) -> dict:
        """What lrkv.json keeps: everything that decides the result. Where shards end does not."""
        kept = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("max_shard_size", "recipe") and (name, value) != ("attention", None)
        }
        return {**kept, "cache_ratio": self.budget, "name": self.recipe}
