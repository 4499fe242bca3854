"""What a user may ask of a conversion, and which wishes contradict one another. Checked before
anything is read in full.

The command line is made of these fields, and `--help` must not wait for torch: what imports it is
imported where it is used.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LrkvError
from ..settings.fields import Limit, Typed, option

if TYPE_CHECKING:
    from ..families import Family, Geometry, Site
    from ..forms import Form
    from .spend import Budget, Uniform

# more helps most where the text is unlike what the model will read (benchmarks/NOTES.md)
TOKENS, BUILT_IN_TOKENS = 16384, 32768
# share of the original cache that codes take when none is asked for
CODED = 0.25
SPEECH_TOKENS = 4096  # of transcripts: about 20 minutes of speech

AUTO = "auto"  # the form of keys that is chosen
# how much work a cached number of a key may be to read, in words
WORK = ("latency", "balanced", "quality")

SHARE = Limit(
    lambda value: 0 < value < 1,
    "it lies between 0 and 1",
    "a cache ratio of {value} is out of range",
)
WIDE = Limit(
    lambda value: value >= 1,
    "see --max-width-k and --max-width-v",
    "the widest base is at least 1 wide",
)
GROUPED = Limit(
    lambda value: value >= 1,
    "1 is each head by itself",
    "a group of {value} heads has none",
)
SOME = Limit(
    lambda value: value >= 1,
    "give --calibration none for the weights alone",
    "{value} calibration tokens are none",
)


def forms() -> list[str]:
    """Names of the forms of keys, a file each, without importing them (they import torch)."""
    files = (Path(__file__).parent.parent / "forms").glob("*.py")
    names = sorted(file.stem.replace("_", "-") for file in files)
    return ["joint", *(name for name in names if name not in ("joint", "base", "--init--"))]


@dataclass(frozen=True)
class Options(Typed):
    """How to convert. The defaults halve the cache. Raises LrkvError for a value of the wrong type.

    What None stands for is decided where it is used: `spend`, `kinds`, `tokens_of`.
    """

    cache_ratio: float | None = option(
        None,
        "Share of the original cache, in bytes, spent over layers, keys and values where the loss"
        " rises least. Default: 0.25; of 16-bit numbers 0.5, with --keys full 0.75.",
        limits=[SHARE],
    )
    rank: int | None = option(
        None, "Instead: the same residual rank of keys and values in every layer."
    )
    rank_k: int | None = option(None, "Residual rank of keys.")
    rank_v: int | None = option(None, "Residual rank of values.")
    base_width: int | None = option(
        None,
        "With --rank: width of the shared base. Default: one head; 0: one latent per head.",
    )
    base_width_k: int | None = option(None, "Base width of keys.")
    base_width_v: int | None = option(None, "Base width of values.")
    max_width_k: int | None = option(
        None,
        "With --cache-ratio: widest base of keys. Default: one head under RoPE, else four.",
        limits=[WIDE],
    )
    max_width_v: int | None = option(
        None, "With --cache-ratio: widest base of values. Default: four heads.", limits=[WIDE]
    )
    keys: str = option(
        "joint",
        "How RoPE keys are cached: joint (best quality), per-head or rotary (less to rebuild when"
        " read), commuting or channels (nothing to rebuild), full (as they are: only values are"
        " compressed), or auto (the one that loses least within --work).",
        choices=[*forms(), AUTO],
        called="form of keys",
    )
    work: int | str | None = option(
        None,
        "With --keys auto: how much work reading may be, latency (nothing is rebuilt), balanced (a"
        " head at most), quality (whatever is best), or multiply-adds for each cached number of a"
        " key. Default: balanced.",
    )
    bits: int | str = option(
        "auto",
        "Bits of what is cached: auto (each latent as many as it is worth, of 8, 6, 4, 3, 2 and"
        " none), a list such as 8,4,2 to choose from, or 16 for numbers as they are. With --rank"
        " one width, default 16.",
    )
    head_group_size: int | None = option(
        None,
        "Codes of so many neighbouring heads together, in place of all: less work to read, and more"
        " loss. With joint or commuting keys.",
        limits=[GROUPED],
    )
    base: str = option(
        "joint",
        "How the base is found: joint, with the residuals; aligned (C = I after a gauge); mean,"
        " pooled and grouped, to compare with.",
        choices=["joint", "aligned", "mean", "pooled", "grouped"],
    )
    metric: str = option(
        "fisher",
        "Norm of the fit: fisher (by the gradient of the loss), attention, whitened or plain.",
        choices=["fisher", "attention", "whitened", "plain"],
    )
    refit: bool = option(
        True,
        "Correct W_O in closed form after the fit, or not; needs calibration text.",
        flag="--refit/--no-refit",
    )
    calibration: list[str] | None = option(
        None,
        "Text files or folders, several; self for text sampled from the model; none for the weights"
        " alone. Default: a text that ships with the package. Encoder-decoders: .jsonl files of"
        ' {"source": ..., "target": ...} (without a target, what the model writes itself), or'
        " texts, whose paragraphs are sources; speech models: folders of .wav files, transcripts in"
        " x.txt beside x.wav or in transcripts.tsv.",
    )
    calibration_tokens: int | None = option(
        None,
        f"Tokens of calibration text. Default: {BUILT_IN_TOKENS} of the text that ships here,"
        f" {TOKENS} of yours; of an encoder-decoder's sources {TOKENS}, of what is said"
        f" {SPEECH_TOKENS}.",
        limits=[SOME],
    )
    dtype: str = option(
        "auto", "Of the output: auto (the source's), float32, bfloat16, float16 or float64."
    )
    max_shard_size: int | str = option("5GB", "Largest safetensors file.")
    force: bool = option(False, "Allow ranks that do not shrink the cache.", flag="--force")
    recipe: str | None = option(None, "Name of the recipe, to record.", given=False)
    attention: str | None = option(
        None,
        "Which attention of an encoder-decoder's decoder: self, cross, or self,cross (default"
        " there); each has a cache and a budget of its own. Decoder-only models have self alone.",
    )

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "bits", str(self.bits))
        if self.work is not None:
            object.__setattr__(self, "work", str(self.work))
        if self.calibration == ["none"]:
            object.__setattr__(self, "calibration", [])

    def tokens_of(self, family: "Family") -> int:
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
    def spend(self) -> "Budget | Uniform":
        """How much of the original cache to spend: a budget, or the same shape in every layer."""
        from .spend import Budget, Uniform

        uniform = Uniform(
            rank=self.rank,
            rank_k=self.rank_k,
            rank_v=self.rank_v,
            width=self.base_width,
            width_k=self.base_width_k,
            width_v=self.base_width_v,
        )
        planned = self.base == "joint" and self.metric == "fisher" and not self.without_text
        widths, form = self.widths, self.form
        if self.cache_ratio is None and (uniform != Uniform() or not planned):
            one = None if self.bits == "auto" or widths is None else widths[0]
            return replace(uniform, bits=one)
        usual = CODED if widths else form.budget
        ratio = usual if self.cache_ratio is None else self.cache_ratio
        return Budget(ratio, widths, self.max_width_k, self.max_width_v, self.head_group_size)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that codes may have; None for 16-bit numbers. Raises LrkvError for others."""
        from ..fit.codes import WIDTHS

        if self.bits == "16":
            return None
        if self.bits == "auto":
            limited = self.max_width_k or self.max_width_v
            return WIDTHS if self.form.coded and not limited else None
        words = [word.strip() for word in str(self.bits).split(",")]
        if unknown := [word for word in words if word not in map(str, WIDTHS)]:
            raise LrkvError(
                f"{unknown[0]!r} is no width of codes",
                f"--bits is auto, 16, or some of {', '.join(map(str, WIDTHS))}",
            )
        return tuple(sorted({int(word) for word in words}, reverse=True))

    @property
    def form(self) -> "Form":
        """Of keys; joint where it is still to be chosen."""
        from ..forms import form_named

        return form_named("joint" if self.keys == AUTO else self.keys)

    def coded_forms(self, sites: "Sequence[Site]", config) -> list[str]:
        """Names of the forms of keys whose codes go with sites of a kind: joint alone where no key
        turns. [] where nothing is codes.
        """
        from ..forms import FORMS

        geometries = list(dict.fromkeys(site.geometry for site in sites))
        names = []
        for name, form in FORMS.items():
            try:
                form.check(geometries, self.base, config)
            except LrkvError:
                continue
            if (
                form.coded
                and self.widths is not None
                and (form.grouped or not self.head_group_size)
            ):
                names.append(name)
        return names if any(g.rotary for g in geometries) else names[:1]

    def forms_for(self, sites: "Sequence[Site]", config) -> list[str]:
        """Names of the forms of keys of which sites of a kind may have one: that asked for, or
        those that are no more work than asked. Raises LrkvError where all are.
        """
        from ..forms import FORMS, group_count

        if self.keys != AUTO:
            return [self.keys]
        turning = [site.geometry for site in sites if site.geometry.rotary]
        if not turning:
            return ["joint"]
        names, work = self.coded_forms(sites, config), str(self.work or "balanced")
        if work == "quality":
            return names
        rebuilt = {name for name in names if FORMS[name].rebuilds}
        of = lambda g: group_count(g, self.head_group_size)
        effort = {name: max(FORMS[name].effort(g, of(g)) for g in turning) for name in names}
        head = min(g.head_dim for g in turning)
        found = {
            "latency": [name for name in names if name not in rebuilt],
            "balanced": [name for name in names if name not in rebuilt or effort[name] <= head],
        }.get(work) or [name for name in names if work not in WORK and effort[name] <= float(work)]
        if not found:
            least = min(effort, key=effort.__getitem__)
            raise LrkvError(
                f"no form of keys of this model is read within --work {work}",
                f"the least is {least}, {effort[least]} multiply-adds for each cached number",
            )
        return found

    def for_family(self, family: "Family") -> "Options":
        """These options where nothing was said of bits: families whose cache holds no codes keep
        16-bit numbers, in the joint form where it was to be chosen.
        """
        from ..modeling import attention_class

        if self.bits != "auto" or attention_class(family.model_type).takes_codes:
            return self
        keys = "joint" if self.keys == AUTO else self.keys
        return replace(self, bits="16", keys=keys, work=None if self.keys == AUTO else self.work)

    def kinds(self, family: "Family") -> tuple[str, ...]:
        """The kinds of attention to convert. Raises LrkvError for one that does not exist, or that
        this model has not.
        """
        from ..families import KINDS

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

    def check(self, sites: "Sequence[Site]", config) -> None:
        """Raise LrkvError for values out of range, for options that contradict one another, and for
        those that do not go with the model.
        """
        self.check_fields()
        geometries = list(dict.fromkeys(site.geometry for site in sites))
        self.check_groups(geometries)
        self.check_bits(config)
        self.form.check(geometries, self.base, config)
        self.check_spend()
        self.check_work()
        if self.metric == "whitened" and self.without_text:
            raise LrkvError(
                "the whitened metric is made of calibration text, and there is none",
                "give --calibration, or another --metric",
            )
        if self.metric == "attention" and any(g.key_norm for g in geometries):
            raise LrkvError(
                "the attention metric knows nothing of QK-norm, which this model has",
                "leave --metric out, or take whitened or plain",
            )

    def check_bits(self, config) -> None:
        """Raise LrkvError for codes where there can be none."""
        from ..modeling import attention_class

        widths, spent = self.widths, self.spend
        if self.form.coded_only or self.keys == AUTO:
            self.check_coded_only(attention_class(config.model_type).takes_codes)
        if self.bits in ("auto", "16") or widths is None:
            return
        if not self.form.coded:
            raise LrkvError(
                f"--keys {self.keys} caches 16-bit numbers, not codes", "leave --bits out"
            )
        if not attention_class(config.model_type).takes_codes:
            raise LrkvError(
                f"{config.model_type} scales keys after their latents, so that these make no codes",
                "leave --bits out",
            )
        if self.without_text or self.metric != "fisher":
            raise LrkvError(
                "codes need to know how far latents reach and what they are worth, which"
                " calibration text and the fisher metric say",
                "leave --calibration none and --metric out, or --bits",
            )
        if self.base != "joint":
            raise LrkvError(
                f"codes go with the joint base only, not {self.base}", "leave --base out"
            )
        if self.max_width_k or self.max_width_v:
            raise LrkvError(
                "the widest base is a limit of 16-bit numbers", "leave --bits or --max-width out"
            )
        if spent.ratio is None and len(widths) > 1:
            raise LrkvError(
                f"the same shape in every layer has one width of codes, not {self.bits}",
                "give --cache-ratio for several, or one width such as --bits 8",
            )

    def check_coded_only(self, takes_codes: bool) -> None:
        """Raise LrkvError where 16-bit numbers are asked for in a form that has none, or for a
        choice of forms without a budget of codes. takes_codes: whether the family does.
        """
        from .spend import Budget

        spent = self.spend
        bits = spent.bits
        if not takes_codes:
            hint = "this family caches none: leave --keys out"
        elif self.without_text or self.metric != "fisher":
            hint = "these need calibration text and the fisher metric: leave both as they are"
        elif isinstance(spent, Budget) or self.keys != AUTO:
            hint = "leave --bits 16 and --max-width out; beside --rank give --bits 8"
        else:
            bits, hint = None, "give --cache-ratio in place of --rank and --base-width"
        if bits is None or not takes_codes:
            raise LrkvError(f"--keys {self.keys} goes with codes only", hint)

    def check_work(self) -> None:
        """Raise LrkvError for a limit of work that is none, or that nothing is chosen by."""
        if self.work is None:
            return
        if self.keys != AUTO:
            raise LrkvError(
                "--work chooses among forms of keys, and one is named", "give --keys auto with it"
            )
        try:
            fits = self.work in WORK or 0 < float(self.work) < float("inf")
        except ValueError:
            fits = False
        if not fits:
            raise LrkvError(
                f"{self.work!r} is no limit of work",
                f"--work is {', '.join(WORK)} or a number of multiply-adds",
            )

    def check_groups(self, geometries: "Sequence[Geometry]") -> None:
        """Raise LrkvError for groups of heads where there can be none."""
        size = self.head_group_size
        if size is None:
            return
        if self.widths is None or self.spend.ratio is None:
            raise LrkvError(
                "--head-group-size goes with a budget of codes", "give --cache-ratio, not --bits 16"
            )
        if not self.form.grouped:
            raise LrkvError(
                f"--keys {self.keys} knows no groups of heads", "choose joint or commuting keys"
            )
        if odd := [g.kv_heads for g in geometries if g.kv_heads % size and size < g.kv_heads]:
            raise LrkvError(
                f"{odd[0]} KV heads do not fall into groups of {size}",
                f"--head-group-size divides {odd[0]}",
            )

    def check_spend(self) -> None:
        """Raise LrkvError for a budget beside ranks, or beside what it cannot plan; and for limits
        of a budget where there is none.
        """
        ranks = (self.rank, self.rank_k, self.rank_v)
        widths = (self.base_width, self.base_width_k, self.base_width_v)
        if self.cache_ratio is not None:
            if any(value is not None for value in (*ranks, *widths)):
                raise LrkvError(
                    "a cache ratio and ranks or base widths exclude each other",
                    "give --cache-ratio, or --rank with --base-width",
                )
            if self.base != "joint":
                raise LrkvError(
                    f"a cache ratio plans the joint base only, not {self.base}",
                    "give --rank with the other bases",
                )
            if self.metric != "fisher" or self.without_text:
                raise LrkvError(
                    "a cache ratio compares layers by the gradient of the loss, on calibration"
                    " text",
                    "give --rank without text or with other metrics",
                )
        if self.max_width_k is not None and not self.form.sized:
            raise LrkvError(
                f"--keys {self.keys} says already how wide keys are", "leave --max-width-k out"
            )
        if self.spend.ratio is None and (self.max_width_k or self.max_width_v):
            raise LrkvError(
                "the widest base is a limit of --cache-ratio, and there is none here",
                "with --rank, give --base-width",
            )

    def record(self) -> dict:
        """What lrkv.json keeps: everything that decides the result. Where shards end does not."""
        kept = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("max_shard_size", "recipe") and (name, value) != ("attention", None)
        }
        return {**kept, "cache_ratio": self.spend.ratio, "name": self.recipe}
