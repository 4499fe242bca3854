"""Data of healing: read side by side, packed, held out, dealt out by step."""

import json

import pytest
import torch
from conftest import tiny_tokenizer

from lrkv_convert import LrkvError
from lrkv_convert.train.sources import pieces, side_by_side, sources
from lrkv_convert.train.windows import Windows, pack, packed

EOS = 257


def windows(tmp_path, data, **options) -> Windows:
    pack(
        [str(d) for d in data],
        tiny_tokenizer(),
        tmp_path,
        **{
            "seq_len": 16,
            "tokens": 10**6,
            "validation": None,
            "validation_tokens": 32,
            "field": "text",
            "seed": 0,
            "vocabulary": 260,
            **options,
        },
    )
    return packed(tmp_path)


def words(found: Windows, which) -> str:
    return tiny_tokenizer().decode(found.ids(which).flatten().tolist())


@pytest.fixture
def file(tmp_path):
    def make(name: str, content: str):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return make


def as_parquet(path, rows):
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(rows), path, row_group_size=2)
    return path


DOCUMENTS = [f"document {i} " + "abc" * i for i in range(30)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder", "dataset"])
def test_every_kind_of_data_gives_its_documents(kind, tmp_path, monkeypatch):
    if kind == "txt":
        file = tmp_path / "a.txt"
        file.write_text("".join(DOCUMENTS))
    elif kind == "parquet":
        file = as_parquet(
            tmp_path / "a.parquet", [{"text": d, "n": i} for i, d in enumerate(DOCUMENTS)]
        )
    else:
        (tmp_path / "org" / "name").mkdir(parents=True)
        file = tmp_path / "org" / "name" / "a.jsonl"
        file.write_text("".join(json.dumps({"id": 1, "text": d}) + "\n" for d in DOCUMENTS))
    # as `datasets` streams it: a folder stands for a repository of the hub
    if kind == "dataset":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        read = list(pieces("org/name", "text"))
    else:
        [source] = sources([str(file.parent if kind == "folder" else file)], 0)
        read = list(pieces(source, "text"))
    shares = [share for share, _, _ in read]
    assert shares == sorted(shares) and (kind == "dataset" or shares[-1] == 1)
    if kind == "txt":
        assert [text for _, text, _ in read] == ["".join(DOCUMENTS)] and read[-1][2]
    else:
        assert [text for _, text, _ in read] == DOCUMENTS and all(ends for _, _, ends in read)


def test_documents_are_packed_without_gaps_and_with_the_token_that_ends_them(file, tmp_path):
    data = file("a.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    found = windows(tmp_path, [data])
    stream = torch.cat([torch.tensor([*tiny_tokenizer()(d)["input_ids"], EOS]) for d in DOCUMENTS])
    whole = len(stream) // 16
    assert torch.equal(
        found.ids(torch.arange(len(found.tokens))), stream[: whole * 16].view(whole, 16)
    )
    assert (
        sorted([*found.training.tolist(), *found.validation.tolist()]) == list(range(whole))
        and len(found.validation) == 2
    )


def test_a_long_file_is_read_in_pieces_that_join_to_it(file):
    content = "".join(f"línea {i}\n" for i in range(20_000))
    read = list(pieces(file("long.txt", content), "text"))
    assert (
        len(read) > 2
        and "".join(text for _, text, _ in read) == content
        and [ends for *_, ends in read] == [False] * (len(read) - 1) + [True]
    )


def test_no_more_is_read_than_trained_on_and_of_each_source_its_share(file, tmp_path):
    short = file("short.jsonl", (json.dumps({"text": "x" * 30}) + "\n") * 20)
    long = file("long.jsonl", (json.dumps({"text": "y" * 30}) + "\n") * 200)
    found = windows(tmp_path, [short, long], tokens=110 * 31 - 64, validation_tokens=32)
    taken = words(found, torch.arange(len(found.tokens)))
    assert len(found.tokens) == -(-(110 * 31 - 64) // 16) + 2
    assert taken.count("y") / taken.count("x") == pytest.approx(10, rel=0.1)  # half of each
    read = []
    for text, _ in side_by_side([short, long], "text"):
        read.append(text[0])
        if len(read) == 110:
            break
    assert read.count("x") in (10, 11) and read.count("y") in (99, 100)


def test_a_text_of_validation_is_not_trained_on(file, tmp_path):
    found = windows(
        tmp_path, [file("a.txt", "a" * 500)], validation=[str(file("b.txt", "b" * 100))]
    )
    assert set(words(found, found.validation)) == {"b"} and set(words(found, found.training)) - {
        "<",
        "/",
        "s",
        ">",
    } == {"a"}


def test_every_round_reads_every_window_once_in_another_order(file, tmp_path):
    found = windows(tmp_path, [file("a.txt", "".join(map(str, range(1000))))])
    count = len(found.training)
    per_round = [
        [
            i
            for step in range(r * count, (r + 1) * count)
            for i in found.batch(step, 1, seed=3).tolist()
        ]
        for r in range(2)
    ]
    assert (
        sorted(per_round[0]) == sorted(per_round[1]) == found.training.tolist()
        and per_round[0] != per_round[1]
    )
    assert not set(per_round[0]) & set(found.validation.tolist())
    other = [i for step in range(count) for i in found.batch(step, 1, seed=4).tolist()]
    assert sorted(other) == found.training.tolist() and other != per_round[0]
    long = found.batch(0, 3 * count, seed=3)  # a batch may be larger than the data
    assert (
        long[:count].tolist() == per_round[0] and long[count : 2 * count].tolist() == per_round[1]
    )
    assert found.rounds(3 * count * 16) == 3


def test_files_of_a_folder_come_in_an_order_of_the_seed(file, tmp_path):
    for i in range(6):
        file(f"{i}.txt", "x")
    one, same, other = (sources([str(tmp_path)], seed) for seed in (0, 0, 1))
    assert one == same and one != other and set(one) == set(other)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", "", "empty or too short"),
        ("short.txt", "abc", "empty or too short"),
        ("one.txt", "x" * 18, "too short to train on"),
        ("broken.jsonl", '{"text": "a"}\n{"text"\n', "line 2"),
        ("list.jsonl", "[1]\n", "line 1"),
        ("other.jsonl", '{"body": "a"}\n', "text_field"),
        ("number.jsonl", '{"text": 3}\n', "no text"),
        ("nulls.jsonl", '{"text": null}\n', "empty or too short"),
        ("a.parquet", "not parquet", "not parquet"),
        ("a.bin", "abc", "no known kind"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(file, tmp_path, name, content, says):
    with pytest.raises(LrkvError, match=says):
        windows(tmp_path, [file(name, content)])
    assert packed(tmp_path) is None


@pytest.mark.parametrize(
    "data, says",
    [
        (["./nowhere.txt"], "no such file"),
        (["nowhere.txt"], "no such file"),
        ([], "no text"),
        (["empty"], "holds no"),
    ],
)
def test_sources_that_are_not_there_are_refused(tmp_path, monkeypatch, data, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LrkvError, match=says):
        windows(tmp_path, data)


def test_a_validation_text_that_is_too_short_is_named(file, tmp_path):
    with pytest.raises(LrkvError, match="the validation text is empty or too short"):
        windows(tmp_path, [file("a.txt", "a" * 500)], validation=[str(file("b.txt", "b"))])


def test_nulls_are_skipped_and_halves_of_characters_replaced(file, tmp_path):
    data = file("a.jsonl", '{"text": null}\n\n{"text": "x\\ud800y"}\n{"text": ""}\n{"text": "z"}\n')
    assert [text for _, text, _ in pieces(data, "text")] == ["x?y", "z"]
    rows = [{"text": None}, {"text": "a"}, {"text": None}]
    assert [text for _, text, _ in pieces(as_parquet(tmp_path / "a.parquet", rows), "text")] == [
        "a"
    ]


def test_a_mark_of_byte_order_is_no_text_and_lines_may_be_long(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "é".encode() * 200_000)
    assert "".join(text for _, text, _ in pieces(tmp_path / "a.txt", "text")) == "é" * 200_000
    assert max(len(text) for _, text, _ in pieces(tmp_path / "a.txt", "text")) < 100_000


def test_more_files_are_read_than_may_be_open_at_once(tmp_path):
    import resource

    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i}.{'txt' if i % 2 else 'jsonl'}").write_text(
            "x" * 40 if i % 2 else json.dumps({"text": "y" * 40})
        )
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        found = windows(tmp_path, [tmp_path / "many"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(found.tokens) == 300 * 41 // 16


def test_files_and_datasets_are_not_mixed(file, tmp_path):
    with pytest.raises(LrkvError, match="cannot be read side by side"):
        windows(tmp_path, [file("a.txt", "a" * 500), "org/name"])


def test_datasets_are_read_in_turn(monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *a, **k: iter([{"text": name[-1] + str(i)} for i in range(3)]),
    )
    assert [text for text, _ in side_by_side(["org/a", "org/b"], "text")] == [
        "a0",
        "b0",
        "a1",
        "b1",
        "a2",
        "b2",
    ]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(LrkvError, match="it has body, n"):
        windows(tmp_path, [as_parquet(tmp_path / "a.parquet", [{"body": "x", "n": 1}])])


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(LrkvError, match="UTF-8"):
        windows(tmp_path, [tmp_path / "latin.txt"])


def test_a_tokenizer_of_another_model_is_refused(file, tmp_path):
    with pytest.raises(LrkvError, match="does not belong to this model"):
        windows(tmp_path, [file("a.txt", "xyz" * 100)], vocabulary=80)


def test_a_dataset_that_is_not_there_is_refused(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LrkvError, match="cannot read the dataset nobody/nothing"):
        windows(tmp_path, ["nobody/nothing"])


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("datasets", "pyarrow") else find(name, *a),
    )
    (tmp_path / "a.parquet").write_text("x")
    for data in ("org/name", tmp_path / "a.parquet"):
        with pytest.raises(LrkvError, match=r"lrkv-convert\[data\]"):
            windows(tmp_path, [data])


def test_json_of_a_depth_that_nobody_reads(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100000)
    with pytest.raises(LrkvError, match="line 1 of .* is not JSON"):
        windows(tmp_path, [tmp_path / "deep.jsonl"])
