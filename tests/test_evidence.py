"""Beyond perplexity: passkeys, samples, corpora, tasks, and the page that shows it all."""

import json
import re
import types

import pytest
import torch
from conftest import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert import LrkvError
from lrkv_convert.evaluate import compare, longcontext
from lrkv_convert.evaluate.corpora import gather, read_corpus
from lrkv_convert.evaluate.perplexity import Candidate
from lrkv_convert.evaluate.samples import continuation, passages
from lrkv_convert.examples.text import Text

CPU = torch.device("cpu")
PASSAGE = "The tide keeps a ledger of every boat, and pays its debts in driftwood. " * 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "tide.txt"
    file.write_text(PASSAGE)
    return file


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


# ------------------------------------------------------------------------------------- long context


@pytest.mark.parametrize("depth", longcontext.DEPTHS)
def test_the_passkey_lies_at_its_depth_in_a_prompt_of_the_asked_length(depth, tiny):
    _, tokenizer = load(tiny())
    ids, answer = longcontext.prompt(tokenizer, 2000, depth, 48151)
    written, body = tokenizer.decode(ids), len(longcontext.INTRODUCTION)
    assert (
        2000 - len(longcontext.FILLER) < len(ids) + len(answer) <= 2000
        and tokenizer.decode(answer) == " 48151"
    )
    assert written.count("48151") == 2 and written.endswith(longcontext.QUESTION)
    filler = longcontext.FILLER.strip()
    before = written[body : written.index("The pass key is 48151")].count(filler) / written.count(
        filler
    )
    assert before == pytest.approx(depth, abs=0.06)


def test_the_answer_is_cut_as_it_is_after_the_question(tiny):
    """A tokenizer that puts a mark before every text puts it before the question, not before the
    number.
    """
    _, tokenizer = load(tiny())
    marked = lambda text, **kwargs: tokenizer("\u2581" + text, **kwargs)
    marked.eos_token_id = tokenizer.eos_token_id
    _ids, answer = longcontext.prompt(marked, 900, 0.5, 48151)
    assert tokenizer.decode(answer) == " 48151"


@pytest.mark.parametrize("longest", [1024, 30])
def test_recall_is_what_greedy_decoding_writes(longest, tiny, converted):
    for folder in (tiny(), converted()):
        model, _ = load(folder)
        ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(2))
        written = model.generate(
            ids.unsqueeze(0), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=258
        )[0, 100:]
        found, nll = longcontext.recall(Candidate(model), ids, written, longest)
        with torch.no_grad():
            expected = model(torch.cat([ids, written]).unsqueeze(0)).logits[0, 99:-1]
        assert found and nll == pytest.approx(
            torch.nn.functional.cross_entropy(expected, written).item(), rel=1e-4
        )
        wrong = written.clone()
        wrong[-1] = (wrong[-1] + 1) % 256
        assert not longcontext.recall(Candidate(model), ids, wrong, longest)[0]


def test_the_long_context_check_reads_windows_of_that_length(tiny, converted):
    result = compare(
        [str(tiny()), str(converted())],
        [Text("tide", PASSAGE)],
        seq_len=64,
        long_context=512,
        device=CPU,
    )
    assert longcontext.shortest(load(tiny())[1]) == 249
    far, expected = (
        result["long_context"],
        compare(
            [str(tiny()), str(converted())],
            [Text("tide", PASSAGE)],
            seq_len=512,
            max_tokens=1024,
            device=CPU,
        ),
    )
    assert far["tokens"] == 512 and far["windows"] == 2
    for found, row in zip(far["models"], expected["models"]):
        assert found["name"] == row["name"] and [b["to"] for b in found["context"]] == [
            63,
            127,
            255,
            511,
        ]
        assert [b["nll"] for b in found["context"]] == pytest.approx(
            [b["nll"] for b in row["context"]], rel=1e-6
        )
        assert [p["tokens"] for p in found["passkey"]] == [256, 512] and all(
            len(p["depths"]) == 5 for p in found["passkey"]
        )


# ------------------------------------------------------------------------------------------ samples


def test_a_continuation_is_what_the_model_generates(tiny):
    model, tokenizer = load(tiny())
    inputs = tokenizer("The tide", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=258)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert continuation(Candidate(model), tokenizer, "The tide", 9) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_passages_are_spread_over_the_text(tiny):
    _, tokenizer = load(tiny())
    found = passages(torch.tensor(tokenizer(PASSAGE)["input_ids"]), 3, tokenizer)
    assert len(found) == 3 == len({PASSAGE.index(p) % 72 for p in found}) and all(
        p in PASSAGE for p in found
    )


# ------------------------------------------------------------------------------------------ corpora


@pytest.fixture
def hub(monkeypatch):
    """What load_dataset was asked for; it gives five rows."""
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ({"text": f"row {i} of it", "id": i} for i in range(5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext2_is_its_raw_test_split_joined_by_blank_lines(hub):
    [text], seq_len = gather([], ["wikitext2"], None, None)
    assert hub == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "streaming": True})
    ]
    assert (
        text.content == "\n\n".join(f"row {i} of it" for i in range(5))
        and seq_len == 2048
        and text.max_tokens is None
    )


def test_c4_is_its_first_documents_in_256_windows(hub):
    text = read_corpus("c4", 2048)
    assert (
        hub[0][0] == ("allenai/c4",)
        and hub[0][1]["split"] == "validation"
        and "c4-validation.00000" in str(hub[0][1]["data_files"])
    )
    assert (
        text.content == " ".join(f"row {i} of it" for i in range(5))
        and text.max_tokens == 256 * 2048
    )


def test_no_more_of_a_corpus_is_measured_than_its_protocol_says(tiny):
    assert (
        compare([str(tiny())], [Text("short", PASSAGE, max_tokens=100)], seq_len=50, device=CPU)[
            "tokens"
        ]
        == 98
    )


def test_any_dataset_is_read_as_far_as_it_is_needed(hub):
    text = read_corpus("org/name:config:validation", 512, max_tokens=1)
    assert (
        hub == [(("org/name", "config"), {"split": "validation", "streaming": True})]
        and text.content == "row 0 of it\n\nrow 1 of it"
    )


@pytest.mark.parametrize(
    "files, datasets, says",
    [
        ([], [], "no text to measure on"),
        ([], ["wikitex2"], "unknown dataset"),
        ([], ["./texts"], "files go to --text"),
        (["/nowhere.txt"], [], "cannot read the text"),
    ],
)
def test_a_text_that_is_none_is_refused(files, datasets, says):
    with pytest.raises(LrkvError) as refusal:
        gather(files, datasets, None, None)
    assert says in f"{refusal.value.message}; {refusal.value.hint}"


def test_a_dataset_without_text_is_refused_with_its_columns(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"body": "x"}]))
    with pytest.raises(LrkvError) as refusal:
        read_corpus("org/name", 512)
    assert "it has body" in refusal.value.hint


# -------------------------------------------------------------------------------------------- tasks


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A multiple-choice task of our own, offline; and its documents."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [
        {
            "question": f"{i} boats and {i + 1} more are",
            "choices": [f" {2 * i + 1}", " driftwood", f" {i}"],
            "answer": i % 3,
        }
        for i in range(6)
    ]
    (tmp_path / "boats.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "boats.yaml").write_text(f"""task: boats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "boats.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    return types.SimpleNamespace(folder=tmp_path, documents=documents)


@torch.no_grad()
def accuracy(folder, documents) -> float:
    """The same, by hand: the likeliest choice after the question."""
    model, tokenizer = load(folder)
    right = 0
    for document in documents:
        question = tokenizer(document["question"])["input_ids"]
        likely = []
        for choice in document["choices"]:
            ids = torch.tensor([question + tokenizer(choice)["input_ids"]])
            logp = model(ids).logits[0, :-1].log_softmax(-1)
            likely.append(logp.gather(1, ids[0, 1:, None])[len(question) - 1 :].sum().item())
        right += likely.index(max(likely)) == document["answer"]
    return right / len(documents)


@pytest.mark.slow
def test_tasks_give_the_accuracy_of_a_plain_loop(task, tiny, converted, text, tmp_path):
    shown = run(
        "compare",
        tiny(),
        converted(),
        "--text",
        text,
        "--seq-len",
        64,
        "--tasks",
        "boats",
        "--task-folder",
        task.folder,
        "--json",
        tmp_path / "c.json",
    ).stdout
    rows = json.loads((tmp_path / "c.json").read_text())["tasks"]
    assert [(row["task"], row["metric"], row["samples"]) for row in rows] == [
        ("boats", "acc", 6)
    ] * 2
    assert [row["value"] for row in rows] == pytest.approx(
        [accuracy(folder, task.documents) for folder in (tiny(), converted())]
    )
    assert "boats, acc" in shown and f"{rows[1]['value']:.4f}" in shown


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused_before_models_are_loaded(task, tmp_path, text):
    line = run(
        "compare",
        tmp_path,
        tmp_path,
        "--text",
        text,
        "--seq-len",
        64,
        "--tasks",
        "boats,yachts",
        "--task-folder",
        task.folder,
        code=1,
    ).stderr.strip()
    assert (
        line.startswith("error: lm-eval knows no task 'yachts'; ") and len(line.splitlines()) == 1
    )


# ----------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_in_itself_and_holds_every_figure(tiny, converted, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(PASSAGE[::-1])
    run(
        "compare",
        tiny(),
        converted(),
        "--text",
        text,
        other,
        "--seq-len",
        160,
        "--cache",
        "int8",
        "--long-context",
        300,
        "--prompt",
        "<script>alert(1)</script> & more",
        "--json",
        tmp_path / "c.json",
        "--report",
        tmp_path / "r.html",
    )
    page, result = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "c.json").read_text())
    assert (
        not re.search(r"(src|href)=\"(?!data:)", page)
        and "<script" not in page
        and "&lt;script&gt;" in page
    )
    assert page.count("data:image/svg+xml;base64,") == 3
    for row in result["models"]:
        assert (
            f"{row['perplexity']:.3f}" in page
            and f"{row['ratio']:.4f}" in page
            and row["name"] in page
        )
        assert all(f"{bucket['kl']:.4f}" in page for bucket in row["context"])
    assert all(
        f"{d['nll']:.2f}" in page
        for row in result["long_context"]["models"]
        for p in row["passkey"]
        for d in p["depths"]
    )
    assert (
        "lrkv convert model --out model --rank 7 --calibration-tokens 1024" in page
        and len(result["samples"]) == 4
    )
    from html.parser import HTMLParser

    open_tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Tags().feed(page)
    assert not open_tags


def test_one_model_alone_has_a_page_too(tiny, text, tmp_path):
    from lrkv_convert.evaluate.page import write_page

    write_page(
        compare([str(tiny())], [Text("tide", PASSAGE)], seq_len=64, device=CPU),
        tmp_path / "r.html",
        "lrkv eval",
    )
    assert "perplexity" in (tmp_path / "r.html").read_text()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(text, tmp_path):
    no_model = tmp_path / "none"
    assert (
        "nowhere"
        in run(
            "compare",
            no_model,
            no_model,
            "--text",
            text,
            "--report",
            tmp_path / "nowhere" / "r.html",
            code=1,
        ).stderr
    )
    assert (
        "it is a folder"
        in run("compare", no_model, no_model, "--text", text, "--report", tmp_path, code=1).stderr
    )
