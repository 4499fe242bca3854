"""Bytes of the cache against what they cost in quality: LRKV, quantised caches and other low-rank
forms of one model, from one calibration, on the same text, in one table and one picture.

    python benchmarks/frontier.py MODEL --calibration TEXT... --text TEXT... --json FILE
    python benchmarks/frontier.py MODEL --calibration DIR --audio DIR --json FILE

Bytes are shares of a 16-bit cache, as allocated: codes, scales and zeros of 16 bits each; models
run in float32. Nothing is tuned on what it is measured on: give other text than that of
--calibration. After every row FILE is written, and a run with the same protocol goes on from
there; --again METHOD measures that one anew, --only METHOD nothing else.

What is not there as a cache of transformers is simulated: keys and values are rounded as they are
written, in groups with the arithmetic of the method, so nothing is exact that it does not say. A
window is then read in one pass. The caches of transformers are read 128 tokens at a time, their
residual window: a piece attends to itself exactly, and only to what is before it as it was kept.
"""

import argparse
import copy
import datetime
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from environment import environment
from quality import GIVEN, Workbench
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from lrkv_convert.device import pick_device
from lrkv_convert.evaluate.caches import GROUP
from lrkv_convert.evaluate.load import load_tokenizer
from lrkv_convert.evaluate.perplexity import Candidate, EncoderStates, measure, text_windows
from lrkv_convert.examples.example import Example
from lrkv_convert.examples.measured import MeasuredOn, described, examples_of
from lrkv_convert.examples.text import read_texts
from lrkv_convert.fit.refit import refit_output
from lrkv_convert.folder.companions import version
from lrkv_convert.folder.writer import write_json
from lrkv_convert.frontier import ratio_of

WINDOW = 512
TOKEN_GROUP = 32  # tokens that share a scale where keys are quantised per channel, as in KIVI
NUMBER = 16  # bits of a number of the original cache, of a scale and of a zero
EVERYTHING = 1 << 30  # tokens: all of them

Rounds = Callable[[Tensor], Tensor]  # numbers -> what is read back of them

CODED = (0.5, 0.375, 0.25, 0.188, 0.125, 0.094)
NUMBERS = (0.58, 0.5, 0.42, 0.35)
LATENT = (0.75, 0.5, 0.35)
EXACT_LATENT = (0.5, 0.42, 0.35, 0.25)  # of keys and values, where half is exact


# ------------------------------------------------------------------------------- simulated caches


def rounded(x: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding of the groups (..., n): codes of so many bits between the smallest and
    the largest, which is the zero; it and the scale are float16.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    levels = 2**bits - 1
    scale = ((high - low) / levels).half().float()
    low = low.half().float()
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((x - low) / safe).round().clamp_(0, levels) * scale + low


def per_token(x: Tensor, bits: int) -> Tensor:
    """Heads (N, H, S, d), groups of neighbours in a head."""
    return rounded(x.unflatten(-1, (-1, math.gcd(GROUP, x.shape[-1]))), bits).flatten(-2)


def per_channel(x: Tensor, bits: int) -> Tensor:
    """Heads (N, H, S, d), groups of TOKEN_GROUP tokens of each channel; tokens that do not fill a
    group stay exact.
    """
    whole = x.shape[2] // TOKEN_GROUP * TOKEN_GROUP
    if not whole:
        return x
    groups = x[:, :, :whole].unflatten(2, (-1, TOKEN_GROUP)).transpose(-1, -2)
    return torch.cat((rounded(groups, bits).transpose(-1, -2).flatten(2, 3), x[:, :, whole:]), 2)


def float8(x: Tensor, bits: int) -> Tensor:
    """One scale for all, e4m3."""
    scale = x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class Rounding(DynamicCache):
    """A cache that keeps of keys and values what would be read back. Each write is rounded by
    itself.
    """

    def __init__(
        self,
        keys: Rounds,
        values: Rounds,
        config: PreTrainedConfig | None = None,
    ):
        super().__init__(config=config)
        self.of_keys, self.of_values = keys, values

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kept = self.of_keys(key_states), self.of_values(value_states)
        return super().update(*kept, layer_idx, *args, **kwargs)


class Simulated(Candidate):
    """The original, reading from a cache that rounds."""

    def __init__(
        self, model: PreTrainedModel, encoder: EncoderStates, keys: Rounds, values: Rounds
    ):
        super().__init__(model, encoder=encoder)
        self.keys, self.values = keys, values

    def empty(self, tokens: int, longest: int = 0):
        if not self.model.config.is_encoder_decoder:
            return Rounding(self.keys, self.values, self.model.config)
        parts = (Rounding(self.keys, self.values) for _ in range(2))
        return EncoderDecoderCache(*parts)


class Remembered(Candidate):
    """The original, read once: its logits are the same whatever it is measured beside."""

    def __init__(self, model: PreTrainedModel, encoder: EncoderStates):
        super().__init__(model, encoder=encoder)
        self.known: dict[bytes, Tensor] = {}

    def read(self, ids: Tensor, cache, **more) -> Tensor:
        if more:  # of an encoder-decoder: two sounds may say the same
            return super().read(ids, cache, **more)
        key = ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = super().read(ids, cache)
        return self.known[key]


# -------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Way:
    """One row: its name among those of a method, and what makes (bytes as a share of the original's
    16-bit cache, who reads).
    """

    setting: str
    make: Callable[[], tuple[float, Candidate]]


@dataclass(frozen=True)
class Method:
    """label: for the table and the picture; note: what it keeps exact, what its bytes are, how it
    is made; ways: its rows.
    """

    label: str
    note: str
    ways: Callable[["Bench"], Iterator[Way]]


class Bench(Workbench):
    """A workbench that plans in bytes of a 16-bit cache."""

    def __init__(self, *args):
        metrics = ("fisher", "whitened")
        super().__init__(*args, stored=torch.bfloat16, metrics=metrics)
        self.encoder = EncoderStates(self.original)
        self.base = Remembered(self.original, self.encoder)

    @property
    def decoder(self) -> bool:
        return self.study.family.encoder is None

    @property
    def head_dim(self) -> int:
        return self.study.sites[0].geometry.head_dim

    def converted(self, setting: str, **fields) -> Way:
        def make() -> tuple[float, Candidate]:
            plans, model = self.convert(GIVEN, fields)
            return ratio_of(plans), Candidate(model, encoder=self.encoder)

        return Way(setting, make)

    def cached(self, kind: str, bits: float) -> Way:
        """A cache of transformers."""
        return Way(kind, lambda: (bits / NUMBER, Candidate(self.original, kind)))

    def simulated(self, setting: str, bits: float, keys: Rounds, values: Rounds) -> Way:
        make = lambda: (bits / NUMBER, Simulated(self.original, self.encoder, keys, values))
        return Way(setting, make)

    def shared_latent(self, share: float) -> tuple[float, Candidate]:
        """One latent for keys and values of a layer, width m: the original with [W_K W_V] replaced
        by its best approximation of rank m in the covariance of its inputs, and W_O refitted.
        """
        model, store, study = copy.deepcopy(self.original), self.store(GIVEN), self.study
        for site in study.sites:
            seen, attention = study.seen(store, site), model.get_submodule(site.path)
            keys, values = (getattr(attention, name) for name in ("k_proj", "v_proj"))
            W = torch.cat((keys.weight.T, values.weight.T), dim=1).double()  # (D, 2 H d)
            m = int(share * W.shape[1])
            sigma = seen.metrics("whitened").keys.sigma
            directions = torch.linalg.eigh(W.T @ sigma @ W).eigenvectors[:, -m:]
            for module, part in zip((keys, values), ((W @ directions) @ directions.T).chunk(2, 1)):
                module.weight = torch.nn.Parameter(part.T.float(), requires_grad=False)
            if m < W.shape[0]:
                W_O = refit_output(seen, attention, site.adapter.output, seen.weights.W_O)
                output = getattr(attention, site.adapter.output)
                output.weight = torch.nn.Parameter(W_O.flatten(0, 2).T.float(), requires_grad=False)
        return share, Candidate(model, encoder=self.encoder)


def codes(bench: Bench) -> Iterator[Way]:
    for ratio in CODED:
        yield bench.converted(f"--cache-ratio {ratio:g}", cache_ratio=ratio)


def numbers(bench: Bench) -> Iterator[Way]:
    for ratio in NUMBERS:
        yield bench.converted(f"--cache-ratio {ratio:g} --bits 16", cache_ratio=ratio, bits="16")


def fp8(bench: Bench) -> Iterator[Way]:
    if bench.decoder:
        yield bench.cached("fp8", 8)
    else:
        yield bench.simulated("fp8", 8, *[partial(float8, bits=8)] * 2)


def integers(bench: Bench) -> Iterator[Way]:
    for bits in (8, 4, 2) if bench.decoder else ():
        held = bits + 2 * NUMBER / math.gcd(GROUP, bench.head_dim)
        yield bench.cached(f"int{bits}", held)


def tokenwise(bench: Bench) -> Iterator[Way]:
    for bits in (8, 4, 3, 2):
        held = bits + 2 * NUMBER / math.gcd(GROUP, bench.head_dim)
        yield bench.simulated(f"int{bits}", held, *[partial(per_token, bits=bits)] * 2)


def kivi(bench: Bench) -> Iterator[Way]:
    for bits in (4, 3, 2):
        held = bits + NUMBER / TOKEN_GROUP + NUMBER / math.gcd(GROUP, bench.head_dim)
        how = partial(per_channel, bits=bits), partial(per_token, bits=bits)
        yield bench.simulated(f"int{bits}", held, *how)


def latent(bench: Bench) -> Iterator[Way]:
    geometry = bench.study.sites[0].geometry
    whole = geometry.kv_heads * geometry.head_dim
    for share in LATENT:
        fields = {"base_width": int(share * whole), "rank": 0, "metric": "whitened"}
        yield bench.converted(f"{share:.0%}", **fields)


def shared(bench: Bench) -> Iterator[Way]:
    geometry = bench.study.sites[0].geometry
    exact = geometry.width / (2 * geometry.kv_heads * geometry.head_dim)
    for share in EXACT_LATENT if exact <= 0.5 else LATENT:
        yield Way(f"{share:.0%}", partial(bench.shared_latent, share))


METHODS = {
    "codes": Method(
        "LRKV, bits planned",
        "nothing exact; latents of all heads as codes of 8 to 2 bits or none, a 16-bit scale a"
        " token, side and layer: `lrkv convert --cache-ratio`",
        codes,
    ),
    "numbers": Method(
        "LRKV, 16 bits",
        "planned widths and ranks, each latent a 16-bit number: `--cache-ratio --bits 16`",
        numbers,
    ),
    "fp8": Method(
        "FP8",
        "e4m3, one scale a layer and side; of decoders the cache of transformers, else simulated",
        fp8,
    ),
    "integers": Method(
        "HQQ of transformers, last 128 exact",
        "HQQ, per token in groups of 64 or a head's width, scale and zero of 16 bits each; exact by"
        " design: the last 128 tokens, here the piece that is being read. Bytes are those of a"
        " token behind that window",
        integers,
    ),
    "tokenwise": Method(
        "integers per token, nothing exact",
        "simulated: groups of 64 or a head's width, min-max, scale and zero of 16 bits each, no"
        " window; int3 packed to the bit",
        tokenwise,
    ),
    "kivi": Method(
        "KIVI-like",
        "simulated: rotated keys per channel over 32 tokens, values per token in groups of 64 or a"
        " head's width, min-max, scale and zero of 16 bits each; exact: tokens at the end of a"
        " window that fill no 32; int3 packed to the bit",
        kivi,
    ),
    "latent": Method(
        "J-LRD, 16 bits",
        "one latent for all heads and side, whitened metric (Palu), W_O refitted like ours",
        latent,
    ),
    "shared": Method(
        "joint [K;V] latent, 16 bits",
        "simulated: one latent a layer for keys and values, whitened metric, W_O refitted like"
        " ours; as wide as its input (50 % where H d = D) it is that input: exact",
        shared,
    ),
}


# --------------------------------------------------------------------------------------- the run


def read_to_measure(args, bench: Bench) -> list[tuple[dict, list[Example]]]:
    """Each text, or the speech: what it is, and its examples."""
    study = bench.study
    if not bench.decoder:
        material = MeasuredOn(audio=args.audio).read(args.model, study.family, EVERYTHING)
        return [(described(material), examples_of(material, study.checkpoint, study.whole))]
    tokenizer, found = load_tokenizer(args.model), []
    for text in read_texts(args.text):
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
        windows = text_windows(torch.tensor(ids)[: args.tokens], WINDOW)
        found.append(({"name": text.name, "sha256": text.sha256}, windows))
    return found


def run(method: str, way: Way, bench: Bench, texts: list[tuple[dict, list[Example]]]) -> dict:
    """One row."""
    began = time.perf_counter()
    share, candidate = way.make()
    made = time.perf_counter()
    per_text = [measure([bench.base, candidate], examples) for _, examples in texts]
    tokens = [scores[0].tokens for scores in per_text]
    pooled = lambda each: sum(x * n for x, n in zip(each, tokens)) / sum(tokens)
    kl = [found.mean("kl") for _, found in per_text]
    lost = [found.mean("nll") - base.mean("nll") for base, found in per_text]
    row = {
        "method": method,
        "date": datetime.date.today().isoformat(),
        "setting": way.setting,
        "share": share,
        "kl": pooled(kl),
        "ratio": math.exp(pooled(lost)),
        "kl_per_text": kl,
        "ratio_per_text": [math.exp(each) for each in lost],
        "base_nll": pooled([base.mean("nll") for base, _ in per_text]),
    }
    print(
        f"# {method} {way.setting}: {share:.1%} ×{row['ratio']:.4f} KL {row['kl']:.5f}, made in"
        f" {made - began:.0f} s, measured in {time.perf_counter() - made:.0f} s",
        flush=True,
    )
    return row


def asked_for(names: list[str]) -> list[tuple[str, list[str]]]:
    """ "kivi=int4,int2" -> ("kivi", ["int4", "int2"]); "kivi" -> ("kivi", []), which is all."""
    found = []
    for name in names:
        method, _, settings = name.partition("=")
        if method not in METHODS:
            raise SystemExit(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        found.append((method, settings.split(",") if settings else []))
    return found


def show(record: dict) -> None:
    """The table, in Markdown."""
    names = [text["name"] for text in record["texts"]]
    print(f"\n| method | | bytes | KL | perplexity ratio | {' | '.join(names)} |")
    print("|---|---|---|---|---|" + "---|" * len(names))
    for row in record["rows"]:
        each = " | ".join(f"×{ratio:.4f}" for ratio in row["ratio_per_text"])
        print(
            f"| {record['methods'][row['method']]['label']} | {row['setting']} |"
            f" {row['share']:.1%} | {row['kl']:.5f} | ×{row['ratio']:.4f} | {each} |"
        )
    print(f"\n{record['tokens']:,} tokens predicted, float32, {record['device']}")
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        print(f"- {record['methods'][method]['label']}: {record['methods'][method]['note']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    read = parser.add_mutually_exclusive_group(required=True)
    read.add_argument("--text", nargs="+")
    read.add_argument("--audio", help="of a speech model: folder of .wav files and transcripts")
    parser.add_argument("--tokens", type=int, default=8704, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, help="default: what lrkv convert reads")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture of FILE")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(METHODS),
        help=f"{', '.join(METHODS)}; of one some rows: kivi=int4,int2. In this order",
    )
    parser.add_argument("--again", nargs="+", choices=METHODS, default=[])
    args = parser.parse_args()
    logging.disable_progress_bar()
    device, asked = pick_device("auto"), asked_for(args.only)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, args.calibration, args.calibration_tokens, device, Path(folder))
        texts = read_to_measure(args, bench)
        bench.store(GIVEN)
        protocol = {
            "model": Path(args.model).resolve().name,
            "calibration": bench.study.material.record(bench.study.examples),
            "texts": [text for text, _ in texts],
            "tokens": sum(
                int((example.predicts >= 0).sum()) for _, examples in texts for example in examples
            ),
            "window": WINDOW if bench.decoder else None,
        }
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        same = all(known.get(name) == value for name, value in protocol.items())
        rows = [row for row in known["rows"] if row["method"] not in args.again] if same else []
        here, order = environment(device), list(METHODS)
        here["versions"] |= {"lrkv_convert": version("lrkv-convert"), "hqq": version("hqq")}
        notes = {name: {"label": m.label, "note": m.note} for name, m in METHODS.items()}
        record = {**here, **protocol, "methods": notes, "rows": rows}
        for method, settings in asked:
            for way in METHODS[method].ways(bench):
                done = any((r["method"], r["setting"]) == (method, way.setting) for r in rows)
                if done or settings and way.setting not in settings:
                    continue
                rows.append(run(method, way, bench, texts))
                rows.sort(key=lambda row: (order.index(row["method"]), -row["share"]))
                write_json(args.json, record)
        write_json(args.json, record)
    show(record)
    if args.plot:
        from lrkv_convert.plot import bytes_against_loss

        bytes_against_loss(record, args.plot)


if __name__ == "__main__":
    main()
