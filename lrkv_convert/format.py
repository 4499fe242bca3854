"""What a converted folder says of itself: the fields `lrkv` and `lrkv_cross` of config.json, and
lrkv.json. Needs the standard library alone, so that a reader without torch can use it, or copy it.

    folder = read_folder("DIR")
    folder.attention["self"].keys.rank              # of every layer
    folder.tensors("self", 0)                       # names and shapes, before a weight is read
    folder.record.calibration.tokens

Every class is read with `from_json` and written with `to_json`. Fields that this version does not
know are kept. Formats 1 and 2 are read, too; a newer one, or a broken one, is refused in one line.
docs/format.md is made of the annotations below: `python -m lrkv_convert.format docs/format.md`.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from .errors import LrkvError
from .schema import ABSENT, Part, Unlike, as_object, read_object, tables

# 2: cache, keys, geometry and layers stand under their kind of attention, also of a decoder, and
# what a reader of another project must know is said (RoPE, paths, tensors)
# 3: what is cached may be codes
FORMAT = 3
CONFIG, RECORD = "config.json", "lrkv.json"
# the fields of config.json, by kind of attention
FIELDS = {"self": "lrkv", "cross": "lrkv_cross"}
HALF_SPLIT = "half-split"
# forms of keys -> which of what a layer caches was rotated before
ROTATED = {
    "joint": (),
    "rotary": ("base",),
    "commuting": ("base",),
    "full": ("residual",),
    "channels": (),
    "axes": (),
    "turning": ("base",),
}
# the tensors of one side of an attention module: their shapes
TENSORS = {
    "W_shared.weight": ("g m", "D"),
    "C": ("H", "m", "d"),
    "U.weight": ("H r", "D"),
    "B": ("H", "d", "r"),
    "bias": ("H", "d"),
    "base_codes.centres": ("2", "g", "m"),
    "base_codes.lift": ("H", "d"),
    "residual_codes.centres": ("2", "H", "r"),
    "residual_codes.lift": ("H", "d"),
}
# where a form has others
OTHERWISE = {
    "commuting": {"C": ("H", "m")},
    "channels": {"C": ("m",)},
    "axes": {"C": ("m",), "axes": ("H", "d", "d")},
    "turning": {"C": ("g", "m"), "mix": ("H", "H/g", "d")},
}


# --------------------------------------------------------------------------------- in config.json


@dataclass(frozen=True, kw_only=True)
class Side(Part):
    """How keys, or values, of every layer are cached."""

    base_width: Annotated[
        tuple[int, ...], "width m of the shared base, layer by layer; 0: none, or no such layer"
    ]
    rank: Annotated[tuple[int, ...], "rank r of the residual of each head, layer by layer; 0: none"]
    alignment: Annotated[
        bool,
        "whether there are alignment maps C. Without them m is the width of a head, or 0",
    ]
    form: Annotated[
        str | None,
        "of keys: `joint`, base and residual before rotation, rebuilt and rotated when read (also"
        " `--keys per-head`, which has no base); `axes`, the same as codes, in one row for all"
        " heads; `rotary`, the base after rotation; `commuting`,"
        " latents of one frequency each, after rotation; `turning`, the same as codes;"
        " `channels`, channels of keys as codes, before rotation; `full`, whole keys after"
        " rotation. Values have none",
        ABSENT,
    ] = None
    kept: Annotated[
        Any,
        "of `commuting` keys: how many latents each RoPE frequency has, layer by layer; null where"
        " a layer has no such attention",
        ABSENT,
    ] = None
    bits: Annotated[
        Any,
        "of `channels`, `axes` and `turning` keys: layer by layer and head by head, a string with"
        " a digit for each of d channels, how many bits it has, 0 where it was dropped; latents are"
        " the others, those of most bits first, channels of a width as they come; null where a"
        " layer has no such attention",
        ABSENT,
    ] = None
    codes: Annotated[
        Any,
        "layer by layer, of base and of residual: pairs of bits and of how many latents have so"
        " many, in the order of latents; null for 16-bit numbers. Not there where nothing is codes",
        ABSENT,
    ] = None
    groups: Annotated[
        Any,
        "layer by layer, in how many groups of neighbouring heads a base is shared, g; each has one"
        " of its own, m wide. Not there where all heads share one",
        ABSENT,
    ] = None
    rotated_in_cache: Annotated[
        tuple[str, ...] | None,
        "of keys: which of `base` and `residual` lies in the cache after rotation; the other lies"
        " there before it, and before the norm of keys. Empty also where nothing is rotated",
        ABSENT,
    ] = None


@dataclass(frozen=True, kw_only=True)
class Cached(Part):
    """The field `lrkv`, or `lrkv_cross`: how one kind of attention is cached."""

    format: Annotated[int, "version of this field; not there in format 1"] = FORMAT
    rope_layout: Annotated[
        str | None,
        "which channels of a head RoPE turns together: `half-split`, i and i + n/2 of the n that"
        " are turned, whatever the source does; null without RoPE",
    ] = None
    rotary_dim: Annotated[
        tuple[int, ...] | None,
        "how many leading channels of a head RoPE turns, n, layer by layer; 0: none",
    ] = None
    keys: Annotated[Side, "keys"]
    values: Annotated[Side, "values"]

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        content = _versioned(content, "the field lrkv")
        keys = as_object(content.get("keys"), "keys")
        form = keys.get("form", "joint")
        if form not in ROTATED:
            raise Unlike(f"keys.form is {form!r}, none of {', '.join(ROTATED)}")
        turned = {"form": form, "rotated_in_cache": list(ROTATED[form])}
        return content | {"keys": turned | keys}

    def check(self) -> None:
        lengths = {
            len(each) for side in (self.keys, self.values) for each in (side.base_width, side.rank)
        }
        if len(lengths) != 1:
            raise Unlike("base_width and rank are not of one length")


# ------------------------------------------------------------------------------------- in lrkv.json


@dataclass(frozen=True, kw_only=True)
class Source(Part):
    """The original."""

    name: Annotated[str, "its name on the hub, or of its folder"]
    path: Annotated[str | None, "where it lay; not there in what `lrkv push` uploads", ABSENT] = (
        None
    )
    sha256: Annotated[str, "of its weights"]
    model_type: Annotated[str, "its family, as transformers calls it"]


@dataclass(frozen=True, kw_only=True)
class Versions(Part):
    """What was installed."""

    lrkv_convert: Annotated[str, "this package"]
    transformers: Annotated[str, "transformers"]
    torch: Annotated[str, "torch"]
    python: Annotated[str | None, "Python", ABSENT] = None


@dataclass(frozen=True, kw_only=True)
class Cost(Part):
    """What one token in the cache takes, over all layers. In cross-attention a token is a position
    of the encoder.
    """

    kv_bytes_per_token_before: Annotated[int, "bytes in the original, in the dtype of the weights"]
    kv_bytes_per_token: Annotated[int, "bytes now"]
    kv_ratio: Annotated[float, "the second divided by the first"]
    kv_flops_per_token_before: Annotated[int, "flops of a decoding step in the original"]
    kv_flops_per_token: Annotated[int, "flops of a decoding step now"]


@dataclass(frozen=True, kw_only=True)
class Geometry(Part):
    """Shapes of the attention, those of its first layer."""

    layers: Annotated[int, "layers in the stack"]
    width: Annotated[int, "width D of the model"]
    kv_heads: Annotated[int, "KV heads H"]
    groups: Annotated[int, "query heads of each"]
    head_dim: Annotated[int, "width d of a head"]
    rotary_dim: Annotated[int, "leading channels of a head that RoPE turns; 0: none"]
    key_norm: Annotated[bool, "whether keys are normalised after their projection (QK-norm)"]


@dataclass(frozen=True, kw_only=True)
class Fit(Part):
    """Keys, or values, of one layer."""

    base_width: Annotated[int, "width m of the shared base"]
    rank: Annotated[int, "rank r of the residual of each head"]
    codes: Annotated[Any, "as in config.json, of this layer", ABSENT] = None
    groups: Annotated[int | None, "of heads that share a base, where there are several", ABSENT] = (
        None
    )
    error: Annotated[float, "of the fit, relative, in its metric"]

    @property
    def bits(self) -> float | None:
        """A latent has on average; None for numbers as they are."""
        blocks = [pair for slot in self.codes or () for pair in slot or ()]
        latents = sum(count for _, count in blocks)
        return sum(bits * count for bits, count in blocks) / latents if latents else None

    def size(self, heads: str = "H") -> str:
        """What is cached, in words: "64 + H·46", or "180 of 4.1 bits"."""
        if self.bits is None:
            return f"{self.base_width} + {heads}·{self.rank}"
        latents = f"{self.base_width} + {heads}·{self.rank}" if self.rank else self.base_width
        times = f"{self.groups} x " if self.groups else ""
        return f"{times}{latents} of {self.bits:.1f} bits"


@dataclass(frozen=True, kw_only=True)
class Layer(Part):
    """One attention module."""

    layer: Annotated[int, "its place in the stack"]
    path: Annotated[
        str | None,
        "of the module: the tensors are called `PATH.keys.…` and `PATH.values.…`",
        ABSENT,
    ] = None
    rotary_dim: Annotated[
        int | None, "leading channels of a head that RoPE turns in this layer", ABSENT
    ] = None
    keys: Annotated[Fit, "keys"]
    values: Annotated[Fit, "values"]


@dataclass(frozen=True, kw_only=True)
class Attention(Part):
    """One kind of attention."""

    cache: Annotated[Cost, "what it takes to cache a token, before and after"]
    keys: Annotated[str, "the form of keys that was asked for (`--keys`)"]
    geometry: Annotated[Geometry, "shapes"]
    rope_layout: Annotated[str | None, "as in config.json", ABSENT] = None
    layers: Annotated[tuple[Layer, ...], "its layers"]


@dataclass(frozen=True, kw_only=True)
class CalibrationText(Part):
    """A text, or a corpus of pairs or of speech."""

    name: Annotated[str, "its name, without the path"]
    sha256: Annotated[str, "of its content"]
    bytes: Annotated[int | None, "its size, of a text", ABSENT] = None
    examples: Annotated[int | None, "how many it has, of a corpus", ABSENT] = None


@dataclass(frozen=True, kw_only=True)
class Calibration(Part):
    """What was read to calibrate."""

    texts: Annotated[tuple[CalibrationText, ...], "texts or corpora; none: by the weights alone"]
    examples: Annotated[int, "windows of text, or pairs"] = 0
    tokens: Annotated[int, "tokens of them, of pairs those of the targets"]
    seq_len: Annotated[int, "length of a window; 0: they differ"] = 0
    targets_by_the_model: Annotated[int, "targets that the source model wrote itself"] = 0


@dataclass(frozen=True, kw_only=True)
class Losses(Part):
    """Negative log-likelihood per token, in nats."""

    original: Annotated[float | None, "of the original, where it was there", ABSENT] = None
    converted: Annotated[float, "before training"]
    healed: Annotated[float, "after it"]

    @property
    def base(self) -> float:
        """What the others are relative to."""
        return self.converted if self.original is None else self.original

    @property
    def known(self) -> dict[str, float]:
        """By name, in the order of events."""
        found = {each: getattr(self, each) for each in ("original", "converted", "healed")}
        return {name: loss for name, loss in found.items() if loss is not None}


@dataclass(frozen=True, kw_only=True)
class Validation(Part):
    """The text that was held out."""

    text: Annotated[
        str | tuple[str, ...], "names of texts, or `held out` between what was trained on"
    ] = "held out"
    tokens: Annotated[int, "how many are predicted"]
    nll: Annotated[Losses, "what the models think of it"]


@dataclass(frozen=True, kw_only=True)
class Healed(Part):
    """A round of training (`lrkv heal`)."""

    kind: Annotated[str, "`heal`"] = "heal"
    date: Annotated[str, "when"]
    recipe: Annotated[dict[str, Any], "its options, and the `name` of the recipe"]
    data: Annotated[tuple[str, ...], "names of files and datasets"]
    windows_sha256: Annotated[str | None, "of the packed windows", ABSENT] = None
    examples: Annotated[int | None, "pairs trained on, of encoder-decoders", ABSENT] = None
    targets_by_the_model: Annotated[
        int | None, "targets of them that a model wrote, the original or this one", ABSENT
    ] = None
    rounds: Annotated[float, "how often each window, or pair, was read"] = 1.0
    teacher: Annotated[str | None, "where the original lay; null: trained without it"]
    loss: Annotated[str, "`kl`, `ce` or `mix`"]
    steps: Annotated[int, "steps"]
    tokens: Annotated[int, "tokens trained on"]
    seconds: Annotated[float, "of training"]
    peak_memory_bytes: Annotated[int | None, "the most held, of the device"] = None
    processes: Annotated[int, "processes"] = 1
    device: Annotated[str, "device"] = "cpu"
    precision: Annotated[str, "`no` (float32), `bf16` or `fp16`"] = "no"
    validation: Annotated[Validation, "losses on text that was held out"]
    versions: Annotated[Versions | None, "what was installed"] = None
    picture: Annotated[str | None, "name of the curve's picture in the folder"] = None


@dataclass(frozen=True, kw_only=True)
class TextMeasured(Part):
    """One model on one text."""

    name: Annotated[str, "of the text"]
    perplexity: Annotated[float, "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Measured(Part):
    """One model on all texts; what else is said is explained in compare.md."""

    name: Annotated[str, "of the model"]
    perplexity: Annotated[float, "perplexity"]
    ratio: Annotated[float, "of perplexities, to the first model"]
    ratio_low: Annotated[float | None, "95 % interval of the ratio"]
    ratio_high: Annotated[float | None, "95 % interval of the ratio"]
    kl: Annotated[float, "KL to the first model, in nats"]
    top1_agreement: Annotated[float | None, "same most probable token", ABSENT] = None
    kv_ratio: Annotated[float | None, "share of the cache, of a decoder", ABSENT] = None
    self_ratio: Annotated[float | None, "share of the self-attention's cache", ABSENT] = None
    cross_ratio: Annotated[float | None, "share of the cross-attention's cache", ABSENT] = None
    same_words: Annotated[float | None, "same words written, of encoder-decoders", ABSENT] = None
    word_error_rate: Annotated[float | None, "to the references, if there are any", ABSENT] = None
    texts: Annotated[tuple[TextMeasured, ...], "by text"]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Part):
    """What `lrkv compare --card` measured."""

    date: Annotated[str, "when"]
    texts: Annotated[tuple[str, ...], "names of the texts"]
    sha256: Annotated[tuple[str, ...], "of the texts"]
    tokens: Annotated[int, "tokens predicted"]
    seq_len: Annotated[int | None, "length of a window; null: of encoder-decoders"] = None
    dtype: Annotated[str, "of the weights as they were measured"]
    rows: Annotated[tuple[Measured, ...], "the source, and this model"]
    retrieval: Annotated[
        Any,
        "what was hidden and asked for: `prose` and number of `texts`, and by task those of the"
        " source and of this model, as compare.md says",
        ABSENT,
    ] = None

    def same(self, other: "Evaluation") -> bool:
        """Whether both are of the same texts in the same windows."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("sha256", "seq_len", "tokens")
        )


@dataclass(frozen=True, kw_only=True)
class Record(Part):
    """lrkv.json: how the folder came about."""

    format: Annotated[int, "version of this record"] = FORMAT
    source: Annotated[Source, "the original"]
    notices: Annotated[
        tuple[str, ...], "what was noted about the source, such as files that are left out"
    ] = ()
    recipe: Annotated[dict[str, Any], "the options of the conversion, and `name` of the recipe"]
    versions: Annotated[Versions, "what was installed"]
    tensors: Annotated[
        dict[str, tuple[str, ...]], "names and shapes of the tensors of one side, in letters"
    ] = field(default_factory=lambda: dict(TENSORS))
    attention: Annotated[dict[str, Attention], "by kind: `self`, and `cross` in encoder-decoders"]
    calibration: Annotated[Calibration, "what was read to calibrate"]
    seed: Annotated[int | None, "null: nothing in a conversion is random"] = None
    seconds: Annotated[float, "of the last run, if it was resumed"]
    seconds_per_stage: Annotated[dict[str, float], "the same by stage"] = field(
        default_factory=dict
    )
    peak_memory_bytes: Annotated[int | None, "the most held; null: the system does not say"] = None
    history: Annotated[tuple[Healed, ...], "rounds of training since, the last one last"] = ()
    evaluations: Annotated[
        tuple[Evaluation, ...], "measured with `lrkv compare --card`; not there before", ABSENT
    ] = ()

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Format 1 had cache, keys, geometry and layers of a decoder at the top."""
        content = _versioned(content, "the record")
        moved = ("cache", "keys", "geometry", "layers")
        if "attention" not in content and all(name in content for name in moved):
            rest = {name: value for name, value in content.items() if name not in moved}
            content = rest | {"attention": {"self": {name: content[name] for name in moved}}}
        kinds = as_object(content.get("attention"), "attention")
        if not kinds or not kinds.keys() <= FIELDS.keys():
            found = ", ".join(map(str, kinds)) or "none"
            raise Unlike(f"attention is of the kinds {found}, not of {' and '.join(FIELDS)}")
        return content


# -------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Folder:
    """A converted folder, without its weights.

    config: config.json as it stands; attention: how each kind is cached, "self" and "cross" where
    they were converted; record: lrkv.json.
    """

    path: Path
    config: dict[str, Any]
    attention: dict[str, Cached]
    record: Record

    @property
    def model_type(self) -> str:
        """The family, as transformers calls that of the original."""
        return self.record.source.model_type

    def tensors(self, kind: str, layer: int) -> dict[str, tuple[int, ...]]:
        """Names, inside the attention module of a layer, and shapes of what stands in the place of
        its projections of keys and values. Biases, as wide as H d, are not among them: whether
        there are any, the file of the weights says.
        """
        sides, geometry = self.attention[kind], self.record.attention[kind].geometry
        found = {}
        for name, side in (("keys", sides.keys), ("values", sides.values)):
            m, r = side.base_width[layer], side.rank[layer]
            g = side.groups[layer] if side.groups else 1
            # what a letter of TENSORS stands for
            sizes = {
                "D": geometry.width,
                "H": geometry.kv_heads,
                "d": geometry.head_dim,
                "m": m,
                "r": r,
                "H r": geometry.kv_heads * r,
                "2": 2,
                "g": g,
                "g m": g * m,
                "H/g": geometry.kv_heads // g,
            }
            base, residual = side.codes[layer] if side.codes else (None, None)
            there = {
                "W_shared.weight": m > 0,
                "C": m > 0 and side.alignment,
                "U.weight": r > 0,
                "B": r > 0 and side.form != "full",
                "base_codes": base is not None,
                "residual_codes": residual is not None,
                "mix": side.form == "turning",
                "axes": side.form == "axes",
            }
            shapes = TENSORS | OTHERWISE.get(side.form or "joint", {})
            for tensor, shape in shapes.items():
                if there.get(tensor, there.get(tensor.partition(".")[0])):
                    found[f"{name}.{tensor}"] = tuple(sizes[letter] for letter in shape)
        return found


def read_folder(path: str | Path) -> Folder:
    """What a converted folder says of itself, with the standard library alone. Raises LrkvError for
    any other folder, and for one that was written by a newer lrkv-convert, or is broken.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise LrkvError(
            f"there is no folder {path}",
            "give the folder of a converted model; one of the hub must be downloaded first",
        )
    found = {}
    for name in (CONFIG, RECORD):
        try:
            found[name] = read_object(path / name)
        except OSError as error:
            raise LrkvError(
                f"{path} is not a converted model: it has no {name}",
                "make one with lrkv convert MODEL --out DIR",
            ) from error
    config, record = found[CONFIG], Record.from_json(found[RECORD], str(path / RECORD))
    attention = {
        kind: _completed(Cached.from_json(config[name], f"{name} of {path / CONFIG}"), said)
        for kind, name in FIELDS.items()
        if config.get(name) is not None and (said := record.attention.get(kind)) is not None
    }
    if attention.keys() != record.attention.keys():
        raise LrkvError(
            f"{path / CONFIG} does not say how {' and '.join(record.attention)}-attention is"
            " cached, as lrkv.json does",
            "are both files of the same conversion?",
        )
    return Folder(path, config, attention, record)


def _completed(cached: Cached, said: Attention) -> Cached:
    """With what a field of format 1 leaves to the record."""
    turned, layers = said.geometry.rotary_dim, len(cached.keys.rank)
    if cached.rotary_dim is not None:
        return cached
    return replace(
        cached,
        rotary_dim=(turned,) * layers,
        rope_layout=HALF_SPLIT if turned else None,
    )


def _versioned(content: Any, what: str) -> dict[str, Any]:
    """An object of this format or an older one, with the version of today. Raises LrkvError for a
    newer one.
    """
    version = as_object(content, "it").get("format", 1)
    if isinstance(version, int) and version > FORMAT:
        raise LrkvError(
            f"{what} is of format {version}, and this lrkv-convert reads 1 to {FORMAT}",
            "update lrkv-convert",
        )
    if isinstance(version, bool) or version not in range(1, FORMAT + 1):
        raise Unlike(f"format is {version!r}, not 1 to {FORMAT}")
    return content | {"format": FORMAT}


# --------------------------------------------------------------------------------- the schema page

BEGIN = "<!-- fields of {}: python -m lrkv_convert.format docs/format.md -->"
END = "<!-- end of fields -->"
PAGES = {CONFIG: Cached, RECORD: Record}


def page(text: str) -> str:
    """docs/format.md with the tables as they are today between its markers."""
    for name, cls in PAGES.items():
        begin = BEGIN.format(name)
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not end:
            raise LrkvError(f"the page has no {begin} ... {END}", "put both where the tables go")
        text = f"{before}{begin}\n\n{tables(cls)}\n\n{END}{after}"
    return text


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
