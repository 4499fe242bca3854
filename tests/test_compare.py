"""The figures of `compare` agree with an independent computation and do not depend on how the work is cut."""
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert.calibrate import Text
from lrkv_convert.evaluate import compare
from lrkv_convert.evaluate.compare import text_windows

CPU = torch.device("cpu")
TEXT = Text("sample", "It is a truth rarely acknowledged that a cache in want of memory must be in search of a smaller rank. " * 9)
EXACT = 1e-6


def run(paths, **kwargs):
    return compare([str(p) for p in paths], TEXT, **{"seq_len": 64, "device": CPU, **kwargs})


@torch.no_grad()
def plain_loop(folder, seq_len=64):
    """Perplexity, one window and one token at a time, with transformers alone; and the log-probabilities."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)(TEXT.content)["input_ids"]
    total, count, rows = 0.0, 0, []
    for start in range(0, len(ids), seq_len):
        window = torch.tensor([ids[start:start + seq_len]])
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
    assert base["perplexity"] == pytest.approx(ppl, rel=EXACT) and other["perplexity"] == pytest.approx(ppl_other, rel=EXACT)
    assert other["ratio"] == pytest.approx(ppl_other / ppl, rel=EXACT) and base["ratio"] == 1
    assert other["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert other["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size, tiny, converted):
    for a, b in zip(run([tiny(), converted()], batch_size=batch_size)["models"], run([tiny(), converted()], batch_size=2)["models"]):
        assert a["nll"] == pytest.approx(b["nll"], rel=EXACT) and a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-9)


def test_windows_cover_the_text_once():
    ids = torch.arange(103)
    assert torch.equal(torch.cat([b.flatten() for b in text_windows(ids, 20, 2)]), ids)
    assert [b.shape for b in text_windows(ids, 20, 2)] == [(2, 20), (2, 20), (1, 20), (1, 3)]
    assert [b.shape for b in text_windows(ids[:81], 20, 9)] == [(4, 20)]        # one token alone predicts nothing
    assert [b.shape for b in text_windows(ids[:7], 20, 9)] == [(1, 7)]


def test_the_json_has_the_promised_fields(tiny, converted):
    result = run([tiny(), converted(), converted(base="aligned")], max_tokens=100)
    assert {"text", "tokens", "models", "seq_len", "bos"} <= result.keys() and result["tokens"] == 98
    for row in result["models"]:
        assert {"path", "nll", "perplexity", "ratio", "kl", "top1_agreement", "kv_bytes_per_token", "kv_ratio", "parameters"} <= row.keys()
        assert row["kv_bytes_per_token"] == row["kv_bytes_per_token_allocated"]
    assert result["models"][0]["kl"] == 0 and result["models"][0]["top1_agreement"] == 1 and result["models"][0]["path"] == str(tiny())
    assert result["models"][1]["kv_ratio"] == pytest.approx((20 + 21) / 60)
