"""Retrieval tasks: what they hide and where, and what `lrkv compare --retrieval` says of it."""

import json

import pytest
import torch
from conftest import run
from test_evidence import PASSAGE, load
from transformers import PreTrainedTokenizerBase

from lrkv_convert import LrkvError, heal
from lrkv_convert.evaluate import compare
from lrkv_convert.evaluate.perplexity import Candidate
from lrkv_convert.evaluate.retrieval import answers, retrieval
from lrkv_convert.examples.retrieval import (
    FILLER,
    NEEDLES,
    TASKS,
    Asked,
    Hidden,
    sentences_of,
    shortest,
    texts,
    windows,
)
from lrkv_convert.examples.text import Text
from lrkv_convert.train.windows import pack, packed

CPU = torch.device("cpu")
BOATS = " ".join(f"Boat {i} pays its debts in driftwood." for i in range(400))


@pytest.fixture
def tokenizer(tiny) -> PreTrainedTokenizerBase:
    return load(tiny())[1]


@pytest.mark.parametrize(
    "task, prose",
    [(task, prose) for task in TASKS for prose in (BOATS, None) if (task, prose) != ("copy", None)],
    ids=lambda given: "prose" if given == BOATS else given or "filler",
)
def test_what_is_asked_for_lies_where_it_should(task, prose, tokenizer):
    tokens = shortest(tokenizer) + 400
    found = list(texts(tokenizer, task, prose, tokens, 3))
    assert len(found) == 3 and [
        h.text.tolist() for h in texts(tokenizer, task, prose, tokens, 3)
    ] == [h.text.tolist() for h in found]
    for hidden in found:
        text = tokenizer.decode(hidden.text)
        assert len(hidden.asked) == (NEEDLES if task in ("keys", "words", "uuids") else 1)
        for asked in hidden.asked:
            size = len(hidden.text) + len(asked.question) + len(asked.answer)
            assert size <= tokens
            answer = tokenizer.decode(asked.answer).strip()
            if task in ("values", "queries"):
                values = answer.replace(" and ", ", ").split(", ")
                places = [text.index(f" {value}.") for value in values]
                assert len(values) == NEEDLES and places == sorted(places)
                assert asked.depth is None
                continue
            if task != "copy":
                assert text.count(answer) == 1
            place = text.index(answer) / len(text)
            assert asked.depth is not None and abs(place - asked.depth) < 0.25
        # most of a long text hides
        assert sum(s.strip() in text for s in sentences_of(prose or FILLER)) >= 3


def test_texts_differ_by_seed_and_go_on_where_the_last_ended(tokenizer):
    tokens = shortest(tokenizer) + 100
    one, other = (list(texts(tokenizer, "keys", BOATS, tokens, 2, seed)) for seed in (0, 1))
    assert not torch.equal(one[0].text, other[0].text)
    assert tokenizer.decode(one[0].text)[:40] != tokenizer.decode(one[1].text)[:40]


@pytest.mark.parametrize("longest", [1024, 30])
def test_answers_are_what_greedy_decoding_writes(longest, tiny, converted):
    for folder in (tiny(), converted()):
        model, _ = load(folder)
        draw = torch.Generator().manual_seed(2)
        text = torch.randint(0, 256, (100,), generator=draw)
        asked, expected = [], []
        for _ in range(2):
            question = torch.randint(0, 256, (7,), generator=draw)
            ids = torch.cat((text, question))
            written = model.generate(
                ids.unsqueeze(0),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=258,
            )[0, len(ids) :]
            wrong = written.clone()
            wrong[-1] = (wrong[-1] + 1) % 256
            asked += [Asked(question, written, 0.5), Asked(question, wrong, 0.5)]
            with torch.no_grad():
                logits = model(torch.cat((ids, written)).unsqueeze(0)).logits[0, len(ids) - 1 : -1]
            expected.append(torch.nn.functional.cross_entropy(logits, written).item())
        found = answers(Candidate(model), Hidden(text, tuple(asked)), longest)
        assert [right for right, _ in found] == [True, False, True, False]
        assert [nll for _, nll in found[::2]] == pytest.approx(expected, rel=1e-4)


def test_every_task_is_told_for_every_model(tiny, converted):
    models = [load(folder) for folder in (tiny(), converted())]
    candidates, tokenizer = [Candidate(model) for model, _ in models], models[0][1]
    least, seen = shortest(tokenizer), []
    found = retrieval(
        candidates, tokenizer, [least, least + 50], PASSAGE, 2, lambda *state: seen.append(state)
    )
    assert [len(rows) for rows in found] == [2 * 13] * 2 and seen[-1][0] == seen[-1][1] == 52
    for base, own in zip(*found):
        assert [base[key] for key in ("task", "haystack", "tokens", "asked")] == [
            own[key] for key in ("task", "haystack", "tokens", "asked")
        ]
        for row in (base, own):
            assert 0 <= row["found_low"] <= row["found"] / row["asked"] <= row["found_high"] <= 1
            assert row["nll"] > 0
            if row["depths"]:
                assert sum(each["asked"] for each in row["depths"]) == row["asked"]
                mean = sum(each["nll"] * each["asked"] for each in row["depths"]) / row["asked"]
                assert mean == pytest.approx(row["nll"])


def test_the_command_shows_and_keeps_it(tiny, converted, tmp_path):
    text = tmp_path / "tide.txt"
    text.write_text(PASSAGE)
    folder, least = converted(), shortest(load(tiny())[1])
    done = run(
        "compare",
        tiny(),
        folder,
        "--text",
        text,
        "--max-tokens",
        200,
        "--seq-len",
        100,
        "--retrieval",
        least,
        "--retrieval-texts",
        1,
        "--json",
        tmp_path / "c.json",
        "--report",
        tmp_path / "r.html",
        "--samples",
        0,
        "--card",
    )
    result = json.loads((tmp_path / "c.json").read_text())["retrieval"]
    base, own = (row["tasks"] for row in result["models"])
    page, card = (tmp_path / "r.html").read_text(), (folder / "README.md").read_text()
    for a, b in zip(base, own):
        for where in (done.stdout, page, card):
            assert f"{a['task']}, {a['haystack']}" in where
            assert f"{a['nll']:.3f}" in where and f"{b['nll']:.3f}" in where
    assert "tide.txt" in done.stdout and f"of {least:,} tokens each" in " ".join(
        done.stdout.split()
    )


@pytest.mark.parametrize(
    "given, says",
    [({"retrieval": [100]}, "what retrieval tasks hide"), ({"retrieval": [641]}, "can read")],
    ids=str,
)
def test_lengths_that_cannot_be(given, says, tiny):
    with pytest.raises(LrkvError, match=says):
        compare([str(tiny())], [Text("tide", PASSAGE)], seq_len=64, device=CPU, **given)


def test_a_tokenizer_that_begins_texts_begins_these(tokenizer):
    class Begins:
        eos_token_id = 257

        def __call__(self, text, add_special_tokens=True, **kwargs):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [256, *ids, 257] if add_special_tokens else ids}

    hidden = next(iter(texts(Begins(), "keys", PASSAGE, 800, 1)))
    assert hidden.text[0] == 256 and 257 not in hidden.text


# ----------------------------------------------------------------------------------------- training


def test_windows_hide_and_ask_and_are_full(tokenizer):
    tokens = shortest(tokenizer) + 300
    found = list(windows(tokenizer, BOATS, tokens, 14, seed=1))
    assert len(found) == 14 and all(len(ids) == tokens for ids in found)
    assert found == list(windows(tokenizer, BOATS, tokens, 14, seed=1))
    assert found != list(windows(tokenizer, BOATS, tokens, 14, seed=2))
    said = [tokenizer.decode(ids) for ids in found]
    for text, task in zip(said, TASKS * 2):
        begins, _, ends = text.partition("\n\nOnce more:" if task == "copy" else "\n\nWhat ")
        assert begins.count("driftwood") > 3
        # an answer behind its question
        if task == "copy":
            assert ends.strip()[:40] in begins
        elif task in ("values", "queries"):
            assert ends.partition("They are ")[2][:4] in begins
        else:
            assert begins.count(ends.partition("? ")[2].partition(" is ")[2][:4]) >= 1
    with pytest.raises(ValueError, match="hide takes"):
        next(windows(tokenizer, BOATS, 100, 1, seed=0))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_of_what_is_trained_on_is_retrieval(share, tokenizer, tmp_path):
    file, size = tmp_path / "boats.txt", shortest(tokenizer)
    file.write_text(BOATS)
    pack(
        [str(file)],
        tokenizer,
        tmp_path,
        seq_len=size,
        tokens=16 * size,
        validation=None,
        validation_tokens=2 * size,
        field="text",
        seed=0,
        vocabulary=300,
        retrieval=share,
    )
    data = packed(tmp_path)
    assert data is not None and len(data.validation) >= 1
    asks = lambda indices: [
        any(mark in tokenizer.decode(ids) for mark in ("\n\nWhat ", "\n\nOnce more:"))
        for ids in data.ids(indices)
    ]
    assert not any(asks(data.validation))
    found = asks(data.training)
    assert sum(found) / len(found) == pytest.approx(share, abs=0.1)


def test_training_refuses_what_cannot_hide(converted, tmp_path):
    file = tmp_path / "boats.txt"
    file.write_text(BOATS)
    given = {"tokens": 1000, "seq_len": 100, "retrieval": 0.5}
    with pytest.raises(LrkvError, match="larger seq_len, or retrieval 0"):
        heal(converted(), tmp_path / "out", [str(file)], **given)
