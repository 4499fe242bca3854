"""The figures of `compare` agree with an independent computation and do not depend on how the work
is cut.
"""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert import LrkvError
from lrkv_convert.evaluate import compare
from lrkv_convert.evaluate.caches import PIECE
from lrkv_convert.evaluate.compare import short_names
from lrkv_convert.evaluate.perplexity import (
    Candidate,
    Scores,
    batches_of,
    measure,
    text_windows,
)
from lrkv_convert.evaluate.statistics import buckets, by_context, interval, summary
from lrkv_convert.examples.example import window
from lrkv_convert.examples.text import Text

CPU = torch.device("cpu")
OTHER = Text(
    "other",
    "Sevens are odd and eights are even, but nobody asks a nine how it feels about squares. " * 5,
)
TEXT = Text(
    "sample",
    "It is a truth rarely acknowledged that a cache in want of memory must be in search of a"
    " smaller rank. " * 9,
)
EXACT = 1e-6


def run(paths, **kwargs):
    return compare([str(p) for p in paths], [TEXT], **{"seq_len": 64, "device": CPU, **kwargs})


@torch.no_grad()
def plain_loop(folder, seq_len=64):
    """Perplexity, one window and one token at a time, with transformers alone; and the
    log-probabilities.
    """
    model, ids = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder)(TEXT.content)["input_ids"],
    )
    total, count, rows = 0.0, 0, []
    for start in range(0, len(ids), seq_len):
        window = torch.tensor([ids[start : start + seq_len]])
        if window.shape[1] < 2:
            continue
        logp = torch.log_softmax(model(window).logits[0].double(), -1)
        for t in range(window.shape[1] - 1):
            total -= logp[t, window[0, t + 1]].item()
            count += 1
        rows.append(logp[:-1])
    return math.exp(total / count), count, torch.cat(rows)


def test_perplexity_kl_and_agreement_equal_a_plain_loop(tiny, converted):
    result = run([tiny(), converted()])
    base, other = result["models"]
    (ppl, count, p), (ppl_other, _, q) = plain_loop(tiny()), plain_loop(converted())
    assert result["tokens"] == count
    assert base["perplexity"] == pytest.approx(ppl, rel=EXACT) and other[
        "perplexity"
    ] == pytest.approx(ppl_other, rel=EXACT)
    assert other["ratio"] == pytest.approx(ppl_other / ppl, rel=EXACT) and base["ratio"] == 1
    assert other["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert other["top1_agreement"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size, tiny, converted):
    for a, b in zip(
        run([tiny(), converted()], batch_size=batch_size)["models"],
        run([tiny(), converted()], batch_size=2)["models"],
    ):
        assert a["nll"] == pytest.approx(b["nll"], rel=EXACT) and a["kl"] == pytest.approx(
            b["kl"], rel=1e-4, abs=1e-9
        )


def test_windows_cover_the_text_once():
    ids = torch.arange(103)
    shapes = lambda ids, size: [
        (len(batch), batch[0].tokens) for batch in batches_of(text_windows(ids, 20), size)
    ]
    assert torch.equal(torch.cat([e.ids.flatten() for e in text_windows(ids, 20)]), ids)
    assert shapes(ids, 2) == [(2, 20), (2, 20), (1, 20), (1, 3)]
    # one token alone predicts nothing
    assert shapes(ids[:81], 9) == [(4, 20)]
    assert shapes(ids[:7], 9) == [(1, 7)]


def test_the_json_has_the_promised_fields(tiny, converted):
    result = run([tiny(), converted(), converted(base="aligned")], max_tokens=100)
    assert {"texts", "tokens", "models", "seq_len", "bos"} <= result.keys() and result[
        "tokens"
    ] == 98
    for row in result["models"]:
        assert {
            "path",
            "nll",
            "perplexity",
            "ratio",
            "kl",
            "top1_agreement",
            "kv_bytes_per_token",
            "kv_ratio",
            "parameters",
        } <= row.keys()
        assert row["kv_bytes_per_token"] == row["kv_bytes_per_token_allocated"]
    assert (
        result["models"][0]["kl"] == 0
        and result["models"][0]["top1_agreement"] == 1
        and result["models"][0]["path"] == str(tiny())
    )
    assert result["models"][1]["kv_ratio"] == pytest.approx((20 + 21) / 60)


# ---------------------------------------------------------------------- several texts, long windows


def test_several_texts_are_pooled_token_by_token(tiny, converted):
    paths = [str(tiny()), str(converted())]
    both, apart = (
        compare(paths, [TEXT, OTHER], seq_len=64, device=CPU),
        [compare(paths, [text], seq_len=64, device=CPU) for text in (TEXT, OTHER)],
    )
    assert both["tokens"] == sum(r["tokens"] for r in apart) and [
        t["name"] for t in both["texts"]
    ] == ["sample", "other"]
    for i, row in enumerate(both["models"]):
        assert row["nll"] == pytest.approx(
            sum(r["models"][i]["nll"] * r["tokens"] for r in apart) / both["tokens"], rel=EXACT
        )
        assert row["kl"] == pytest.approx(
            sum(r["models"][i]["kl"] * r["tokens"] for r in apart) / both["tokens"], rel=1e-5
        )
        assert [t["nll"] for t in row["texts"]] == pytest.approx(
            [r["models"][i]["nll"] for r in apart], rel=EXACT
        )


def test_windows_too_long_for_one_pass_are_read_through_the_cache(family, tiny, converted):
    folders = tiny(family), converted(family)
    candidates = [Candidate(AutoModelForCausalLM.from_pretrained(f).eval()) for f in folders]
    ids = AutoTokenizer.from_pretrained(folders[0])(TEXT.content, return_tensors="pt").input_ids[0]
    windows = text_windows(ids, 200)
    whole, pieces = (
        measure(candidates, windows, batch_size=2, longest=longest) for longest in (1024, 48)
    )
    for a, b in zip(whole, pieces, strict=True):
        assert a.mean("nll") == pytest.approx(b.mean("nll"), rel=1e-5)
        assert a.mean("kl") == pytest.approx(b.mean("kl"), rel=1e-3, abs=1e-8)
        assert a.tokens == b.tokens == sum(window.tokens - 1 for window in windows)


def test_names_are_as_long_as_they_must_be():
    assert short_names(["a/model", "b/half"]) == ["model", "half"]
    assert short_names(["a/model", "b/model", "b/half"]) == ["a/model", "b/model", "b/half"]
    assert short_names(["model", "model"]) == ["model", "model"]


def test_the_same_folder_written_in_two_ways_has_one_name(tmp_path, monkeypatch):
    (tmp_path / "half").mkdir()
    monkeypatch.chdir(tmp_path / "half")
    assert short_names([".", "../half/", "org/model"]) == ["half", "half", "model"]


# ------------------------------------------------------------------ the interval, length of context


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, truth, inside, trials = random.Random(0), 0.05, 0, 600
    for _ in range(trials):
        tokens = [generator.choice([511, 511, 511, 200]) for _ in range(20)]
        low, high = interval([n * (truth + generator.gauss(0, 0.02)) for n in tokens], tokens)
        inside += low <= math.exp(truth) <= high
    assert 0.92 < inside / trials < 0.98


def test_for_windows_of_one_length_it_is_the_paired_t_test():
    from scipy.stats import ttest_1samp

    generator = random.Random(1)
    means = [generator.gauss(0.03, 0.01) for _ in range(12)]
    expected = ttest_1samp(means, 0).confidence_interval(0.95)
    assert interval([511 * m for m in means], [511] * 12) == pytest.approx(
        (math.exp(expected.low), math.exp(expected.high))
    )
    assert interval([5.0], [511]) == (None, None)


def test_how_hard_a_window_is_does_not_widen_the_interval():
    """Both models read the same windows: a difference that is the same everywhere is certain,
    whatever the losses are.
    """
    hard = [
        torch.rand(63, generator=torch.Generator().manual_seed(i)) * 5 * (i + 1) for i in range(4)
    ]
    found = summary(Scores(hard, hard, hard), Scores([w + 0.1 for w in hard], hard, hard))
    assert (found["ratio_low"], found["ratio"], found["ratio_high"]) == pytest.approx(
        [math.exp(0.1)] * 3, rel=1e-5
    )


@pytest.mark.parametrize("longest", [1, 7, 63, 64, 511, 512, 5000])
def test_every_length_of_context_is_in_one_bucket(longest):
    found = buckets(longest)
    assert [t for first, last in found for t in range(first, last + 1)] == list(
        range(1, longest + 1)
    )


def test_by_context_takes_each_prediction_by_the_tokens_before_it():
    # the loss is the number of tokens before
    nll = [torch.arange(1.0, 101), torch.arange(1.0, 71)]
    scores = Scores(nll, [n / 100 for n in nll], [(n > 63).float() for n in nll])
    first, second = by_context(Scores([n - 1 for n in nll], nll, nll), scores)
    assert (first["from"], first["to"], second["from"], second["to"]) == (1, 63, 64, 100)
    assert first["nll"] == 32 and first["tokens"] == 126 and second["tokens"] == 37 + 7
    assert second["kl"] == pytest.approx(
        sum([*range(64, 101), *range(64, 71)]) / 44 / 100, rel=1e-6
    )
    assert (first["top1_agreement"], second["top1_agreement"]) == (0, 1) and first[
        "ratio"
    ] == pytest.approx(math.e)


# --------------------------------------------------------------------------------- quantised caches


def test_quantised_caches_stand_beside_the_exact_ones(tiny, converted):
    """Nothing differs before the first piece is in the cache, something does afterwards; fewer
    bits, more of it, in fewer bytes.
    """
    pytest.importorskip("hqq")
    result = run([tiny(), converted()], caches=["int8", "int4"], seq_len=3 * PIECE)
    rows = {row["cache"]: row for row in result["models"] if row["path"] == str(tiny())}
    assert [row["cache"] for row in result["models"]] == [None, "int8", "int4"] * 2
    assert rows["int8"]["context"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert 1e-7 < rows["int8"]["context"][-1]["kl"] < rows["int4"]["context"][-1]["kl"] < 0.5
    assert rows["int4"]["kv_ratio"] < rows["int8"]["kv_ratio"] < 0.8


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_batch_size_changes_nothing_for_quantised_caches(kind, tiny):
    pytest.importorskip("hqq")
    try:
        one, four = (
            run([tiny()], caches=[kind], seq_len=PIECE + 40, batch_size=size)["models"][1]
            for size in (1, 4)
        )
    except LrkvError as error:
        pytest.skip(f"this transformers has no such cache: {error}")
    assert (
        one["nll"] == pytest.approx(four["nll"], rel=EXACT)
        and one["kl"] == pytest.approx(four["kl"], rel=1e-3)
        and one["kl"] > 1e-7
    )


def test_what_a_quantised_row_caches_is_what_its_cache_holds(tiny):
    pytest.importorskip("hqq")
    [_, row] = run([tiny()], caches=["int8"], seq_len=2 * PIECE)["models"]
    H, d, layers, group = 3, 20, 2, 4
    # a scale and a zero, float32, for every 4 numbers: gcd(64, 20)
    assert row["kv_bytes_per_token"] == pytest.approx(
        layers * 2 * H * (d + 2 * 4 * d / group), rel=0.01
    )


@torch.no_grad()
def test_a_quantised_row_is_a_plain_loop_over_its_cache(tiny):
    """The same as feeding PIECE tokens at a time to transformers' cache by hand."""
    pytest.importorskip("hqq")
    from transformers import QuantizedCache

    model = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    ids = torch.randint(0, 256, (1, 2 * PIECE + 20), generator=torch.Generator().manual_seed(3))
    cache = QuantizedCache(
        config=model.config,
        backend="hqq",
        nbits=4,
        axis_key=1,
        axis_value=1,
        q_group_size=4,
        residual_length=PIECE,
    )
    logits = torch.cat(
        [model(part, past_key_values=cache).logits for part in ids.split(PIECE, 1)], 1
    )[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    [_, scores] = measure([Candidate(model), Candidate(model, "int4")], [window(ids[0])])
    assert torch.allclose(scores.nll[0], expected, atol=1e-5)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, says",
    [
        ({"caches": ["int3"], "seq_len": 200}, "choose from fp8, int8, int4"),
        ({"caches": ["int8"]}, f"more than {PIECE}"),
        ({"prompts": [""]}, "no beginning"),
        ({"prompts": ["x" * 620]}, "leaves no room"),
        ({"long_context": 200}, "a passkey and its question take 249"),
        ({"long_context": 641}, "more than the models can read"),
        ({"long_context": 0, "max_tokens": 300}, "no text fills"),
        ({"seq_len": 641}, "longer than"),
        ({"max_tokens": 1}, "too short"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(options, says, tiny, converted):
    seen = []
    with pytest.raises(LrkvError) as refusal:
        run([tiny(), converted()], progress=lambda *state: seen.append(state), **options)
    assert says in f"{refusal.value.message}; {refusal.value.hint}" and not seen


def test_a_sliding_window_takes_no_quantised_cache(tiny):
    with pytest.raises(LrkvError, match="has no int8 cache for this model"):
        run([tiny("mistral")], caches=["int8"], seq_len=200)
