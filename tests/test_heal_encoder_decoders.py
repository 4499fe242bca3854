"""Healing of encoder-decoders: what they read, that what is minimised falls, and that the result
is a converted folder like any other.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ctrl_c_after, log, losses, run, without_its_source
from encoder_decoders import (
    build,
    converted,
    load,
    source,
    speech,
    target,
    tiny,
    write_little,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from lrkv_convert import LrkvError
from lrkv_convert.evaluate.load import load_tokenizer, read_config
from lrkv_convert.examples.material import gather
from lrkv_convert.examples.pairs import Corpus, Pair
from lrkv_convert.examples.reader import Reader
from lrkv_convert.families import family_named
from lrkv_convert.healing import heal
from lrkv_convert.modeling import auto_class
from lrkv_convert.train.batch import together
from lrkv_convert.train.divergence import divergence
from lrkv_convert.train.pairs import AT_ONCE, Filler, Pairs, fill, filled, side_by_side
from lrkv_convert.train.student import choose_trained, converted_sites, set_precision

FEW = dict(  # a few steps
    tokens=600,
    batch_size=4,
    validation_tokens=40,
    validate_every=3,
    checkpoint_every=2,
    precision="fp32",
    tracker="none",
)
MORE = dict(FEW, tokens=3000, muon_lr=2e-3, adamw_lr=2e-3, validate_every=100)
BOTH = pytest.mark.parametrize("family", ["t5", "whisper"])
# the same for either, so that one is enough for `make test`
EITHER = pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "whisper"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(family) -> what it is healed on: sources and targets of many lengths."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"source": "sheep " * (2 + i % 5), "target": f"{i} " * (1 + i % 7)} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(len(list(speech(folder / "speech").glob("*.wav")))):
        (folder / "speech" / f"{i}.txt").write_text(f"tone {i}" + " again" * i)
    return lambda family: str(folder / ("speech" if family == "whisper" else "pairs.jsonl"))


@pytest.fixture(scope="module")
def healed(converted, data, tmp_path_factory):
    """healed(family, **options) -> folder; each combination is healed once."""
    made = {}

    def get(family, **options):
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("healed") / "model"
            heal(converted(family), made[key], [data(family)], **{**FEW, **options})
        return made[key]

    return get


def read(folder: Path, model: Path, given: str, **options) -> Pairs:
    """What `heal` makes of the data."""
    config = read_config(str(model))
    family = family_named(config.model_type)
    reader = Reader(
        model, family, load_tokenizer(str(model)), config, load(model).generation_config
    )
    folder.mkdir(exist_ok=True)
    sizes = {"tokens": 600, "validation_tokens": 40, "seed": 0, **options}
    fill(
        gather([given], 0, family).corpora,
        None,
        Filler(folder, reader, lambda: load(model)),
        **sizes,
    )
    return filled(folder)


@torch.no_grad()
def scores(model, examples, teacher=None) -> tuple[float, float]:
    """(KL to the teacher, cross-entropy), means over all tokens, of examples one at a time."""
    sums, n = [0.0, 0.0], 0
    for example in examples:
        logits = [
            each(**example.inputs, use_cache=False).logits[0] for each in (model, teacher) if each
        ]
        count = int((example.predicts >= 0).sum())
        _, kl, ce = divergence(logits[0], (*logits, None)[1], example.predicts, 0.0)
        sums, n = [sums[0] + kl.item() * count, sums[1] + ce.item() * count], n + count
    return sums[0] / n, sums[1] / n


# --------------------------------------------------------------------------------- what it does


@pytest.mark.slow
@BOTH
def test_the_divergence_from_the_original_falls(family, tiny, converted, data, healed, tmp_path):
    folder = healed(family, **MORE)
    kl = [line["kl"] for line in log(folder) if "kl" in line]
    assert kl == losses(folder) and sum(kl[-5:]) < 0.5 * sum(kl[:5])
    found = read(tmp_path / "data", converted(family), data(family))
    examples, original = found.examples(found.training), load(tiny(family))
    before, after = (scores(load(f), examples, original)[0] for f in (converted(family), folder))
    assert after < 0.5 * before


@BOTH
def test_a_step_is_the_mean_over_its_tokens(family, converted, data, healed, tmp_path):
    found = read(tmp_path / "data", converted(family), data(family))
    chosen = found.batch(0, 4, seed=0)
    lengths = found.lengths[chosen, 1]
    assert len(set(lengths.tolist())) > 1
    line = next(line for line in log(healed(family, loss="ce")) if "loss" in line)
    expected = scores(load(converted(family)), found.examples(chosen))[1]
    assert line["loss"] == pytest.approx(expected, rel=1e-5) == line["ce"]
    assert line["tokens"] == found.tokens_of(chosen) == sum(found.lengths[chosen, 0])


@EITHER
@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 4}, {"gradient_checkpointing": True}], ids=str
)
def test_how_a_step_is_computed_does_not_change_it(family, options, healed):
    one, other = healed(family), healed(family, **options)
    # Muon's bfloat16 iteration magnifies rounding, step by step
    assert losses(other)[:8] == pytest.approx(losses(one)[:8], rel=1e-3)


@EITHER
def test_matching_works_with_gradient_checkpointing(family, healed):
    one, other = (
        healed(family, match_attention=1.0, gradient_checkpointing=x) for x in (False, True)
    )
    matches = [[line["match"] for line in log(f) if "match" in line] for f in (one, other)]
    assert matches[0] == pytest.approx(matches[1], rel=1e-3) and len(matches[0]) > 3
    assert losses(one) == pytest.approx(losses(other), rel=1e-3)


@BOTH
def test_validation_is_that_of_the_held_out_examples(family, converted, data, healed, tmp_path):
    found = read(tmp_path / "data", converted(family), data(family))
    entry = json.loads((healed(family) / "lrkv.json").read_text())["history"][0]
    assert entry["windows_sha256"] == found.sha256 and entry["examples"] == len(found.training)
    assert entry["validation"]["tokens"] == found.predicted_of(found.validation)
    examples = found.examples(found.validation)
    for name, folder in (("converted", converted(family)), ("healed", healed(family))):
        ce = scores(load(folder), examples)[1]
        assert entry["validation"]["nll"][name] == pytest.approx(ce, rel=1e-4)


@EITHER
def test_a_resumed_run_ends_with_the_same_bytes(
    family,
    converted,
    data,
    healed,
    tmp_path,
):
    copy, original = tmp_path / Path(data(family)).name, Path(data(family))
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 4 of"):
        heal(converted(family), tmp_path / "out", [str(copy)], report=ctrl_c_after(4), **FEW)
    # what was read is there, whatever became of the data since
    for file in [copy] if copy.is_file() else copy.iterdir():
        file.write_bytes(b"")
    heal(converted(family), tmp_path / "out", [str(copy)], resume=True, **FEW)
    weights = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", healed(family))]
    assert weights[0] == weights[1]
    times = ("seconds", "tokens_per_second")
    timeless = lambda folder: [
        {k: v for k, v in line.items() if k not in times} for line in log(folder)
    ]
    assert timeless(tmp_path / "out") == timeless(healed(family))


# --------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("family", ["t5", "whisper", "bart", "marian"])
def test_a_healed_folder_is_a_converted_folder(family, converted, healed):
    before, after = converted(family), healed(family)
    names = lambda folder: {p.name for p in folder.iterdir()}
    assert names(after) == names(before) | {"heal.jsonl", "heal.png"}
    for file in names(before) - {"model.safetensors", "lrkv.json", "README.md"}:
        assert (before / file).read_bytes() == (after / file).read_bytes(), file
    state, other = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert state.keys() == other.keys()
    trained = {name for name in state if not torch.equal(state[name], other[name])}
    assert trained and all("decoder." in n and ("attn" in n.lower() or "Att" in n) for n in trained)
    old, new = (json.loads((folder / "lrkv.json").read_text()) for folder in (before, after))
    [entry] = new.pop("history")
    assert {k: v for k, v in old.items() if k != "history"} == new
    card = (after / "README.md").read_text()
    assert "## Healing" in card and "without training" not in card and "heal.png" in card
    assert f"{math.exp(entry['validation']['nll']['healed']):.3f}" in card


@BOTH
def test_it_loads_with_plain_transformers(family, healed):
    folder, auto = healed(family), auto_class(family)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate(**source(model), max_new_tokens=4, do_sample=False)
    assert len(ids[0]) > 1 and AutoTokenizer.from_pretrained(folder).decode(ids[0]) is not None


def test_only_the_kinds_that_were_converted_train(converted, data, tmp_path):
    before = converted("t5", attention="cross")
    heal(before, tmp_path / "out", [data("t5")], **FEW)
    state, other = (load_file(f / "model.safetensors") for f in (before, tmp_path / "out"))
    changed = {name for name in state if not torch.equal(state[name], other[name])}
    assert changed and all("EncDecAttention" in name for name in changed)


@pytest.mark.parametrize("family", ["marian", "whisper", "t5-gated"])
def test_all_is_all_but_what_the_class_holds_fixed(family, converted, data, tmp_path):
    heal(converted(family), tmp_path / "out", [data(family)], train="all", **FEW)
    state, other = (
        load_file(f / "model.safetensors") for f in (converted(family), tmp_path / "out")
    )
    same = {name for name in state if torch.equal(state[name], other[name])}
    fixed = {
        "marian": {"final_logits_bias"},
        "whisper": {"model.encoder.embed_positions.weight"},
    }.get(family, set())
    # a bias of keys changes no attention, one of positions beyond the longest example no logit
    assert state.keys() == other.keys() and fixed <= same
    assert {n for n in same - fixed if not n.endswith("bias")} <= {
        "model.decoder.embed_positions.weight"
    }


# --------------------------------------------------------------------------------- what is read


def test_what_nobody_has_written_the_original_writes(tiny, converted, tmp_path, monkeypatch):
    from lrkv_convert.train import reading

    loaded, real = [], reading.load_model
    monkeypatch.setattr(
        reading, "load_model", lambda name, *a: (loaded.append(name), real(name, *a))[1]
    )
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} sheep jumped over {i * 7 % 13} fences" for i in range(12)))
    stages = []
    done = heal(converted("t5"), tmp_path / "out", [str(text)], stage=stages.append, **FEW)
    assert done.entry.targets_by_the_model == 12 and loaded == [str(tiny("t5"))]
    assert any("writing" in stage for stage in stages)
    assert (
        "12 targets written by the source model itself"
        in (tmp_path / "out" / "README.md").read_text()
    )
    alone = without_its_source(converted("t5"), tmp_path / "in")
    heal(alone, tmp_path / "alone", [str(text)], **FEW)
    assert loaded[1:] == [str(alone)]
    assert "by the converted model itself" in (tmp_path / "alone" / "README.md").read_text()


def test_speech_without_transcripts_is_written_down_first(converted, tmp_path):
    speech(tmp_path / "said", 6, transcripts=False)
    done = heal(converted("whisper"), tmp_path / "out", [str(tmp_path / "said")], **FEW)
    assert done.entry.targets_by_the_model == 6


def test_no_more_is_read_than_trained_on(converted, tmp_path):
    rows = [{"source": f"{i} sheep", "target": "x" * (5 + i % 7)} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tmp_path / "data", converted("t5"), str(tmp_path / "a.jsonl"), tokens=1500)
    everything = torch.arange(len(found.lengths))
    assert 1540 <= found.tokens_of(everything) < 1540 + 12 and len(everything) > AT_ONCE
    assert sorted([*found.training.tolist(), *found.validation.tolist()]) == everything.tolist()
    # about as many tokens as asked for, between the others
    assert 30 < found.tokens_of(found.validation) < 50 and 0 not in found.validation
    # every file is found again
    assert [e.tokens for e in found.examples(everything)] == found.lengths[:, 0].tolist()
    again = read(tmp_path / "again", converted("t5"), str(tmp_path / "a.jsonl"), tokens=1500)
    other = read(tmp_path / "other", converted("t5"), str(tmp_path / "a.jsonl"), seed=1)
    assert found.sha256 == again.sha256 != other.sha256


def test_corpora_are_read_side_by_side():
    corpora = [
        Corpus(name, [Pair(f"{name}{i}", name) for i in range(count)])
        for name, count in (("a", 10), ("b", 100))
    ]
    order = [pair.name for pair in side_by_side(corpora, seed=0)]
    assert len(set(order)) == 110 and order != [p.name for p in side_by_side(corpora, seed=1)]
    for n in (22, 55, 88):
        assert abs(sum(name[0] == "a" for name in order[:n]) - n / 11) <= 1


def test_validation_of_its_own(converted, data, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"source": "a goat", "target": "bleats"}) + "\n")
    done = heal(
        converted("t5"),
        tmp_path / "out",
        [data("t5")],
        validation=[str(tmp_path / "own.jsonl")],
        **FEW,
    )
    assert done.entry.examples == 12 and tuple(done.entry.validation.text) == ("own.jsonl",)
    assert done.entry.validation.tokens == len("bleats") + 1


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_padding_changes_no_prediction(family, converted, data, tmp_path):
    found, model = read(tmp_path / "data", converted(family), data(family)), load(converted(family))
    examples = found.examples(torch.arange(3))
    batch = together(examples)
    assert ("attention_mask" in batch.inputs) == (family != "whisper")
    with torch.no_grad():
        logits = model(**batch.inputs, use_cache=False).logits
        for row, example in zip(logits, examples):
            alone = model(**example.inputs, use_cache=False).logits[0]
            assert (row[: example.tokens] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert (batch.predicts >= 0).sum() == found.predicted_of(torch.arange(3))


def test_nothing_is_left_to_chance_in_training(tmp_path):
    config = read_config(str(build("whisper", tmp_path / "model")))
    config.apply_spec_augment, config.mask_time_prob, config.dropout = True, 0.9, 0.3
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).train()
    ids, given = target(), source(model)
    twice = lambda: [model(**given, decoder_input_ids=ids).logits for _ in range(2)]
    assert not torch.equal(*twice())
    choose_trained(model, family_named("whisper").sites(config), "all")
    assert torch.equal(*twice())


@BOTH
def test_what_is_frozen_is_held_small_in_both_stacks(family, converted):
    model = load(converted(family))
    known = family_named(family)
    choose_trained(model, converted_sites(known, model.config), "attention")
    set_precision(model, known, torch.bfloat16)
    small = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert any("encoder." in n for n in small) and any("decoder." in n for n in small)
    assert not [n for n, p in model.named_parameters() if n in small and p.requires_grad]
    assert not [n for n in small if "embed" in n or "conv" in n or "shared" in n]


@pytest.mark.slow
@BOTH
def test_bf16_follows_fp32(family, healed):
    assert losses(healed(family, precision="bf16", loss="ce")) == pytest.approx(
        losses(healed(family, loss="ce")), rel=0.1
    )


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "family, given, says",
    [
        ("t5", "speech", "this model reads text"),
        ("whisper", "pairs.jsonl", "no folder of .wav files"),
        ("t5", "self", "self is no calibration"),
        ("t5", "nowhere.jsonl", "cannot read"),
        ("t5", "one.jsonl", "too few to train on"),
    ],
)
def test_data_that_is_no_use_is_refused(family, given, says, converted, data, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"source": "a", "target": "b"}\n')
    places = {"speech": data("whisper"), "pairs.jsonl": data("t5")}
    given = places.get(given, given if given == "self" else str(tmp_path / given))
    with pytest.raises(LrkvError, match=says):
        heal(converted(family), tmp_path / "out", [given], **FEW)
    assert [p.name for p in tmp_path.iterdir()] == ["one.jsonl"]


def test_tokens_for_less_than_a_step_are_refused(converted, data, tmp_path):
    with pytest.raises(LrkvError, match="30 tokens are less than one step of 4 examples of"):
        heal(converted("t5"), tmp_path / "out", [data("t5")], **{**FEW, "tokens": 30})
    assert not list(tmp_path.iterdir())


def test_teachers_that_read_other_things_are_refused(tiny, converted, data, tmp_path):
    for family, teacher in (("t5", "whisper"), ("whisper", "bart")):
        with pytest.raises(LrkvError, match="reads other things than the student"):
            heal(
                converted(family),
                tmp_path / "out",
                [data(family)],
                teacher=str(tiny(teacher)),
                **FEW,
            )


@BOTH
def test_the_command_says_how_to_measure(family, converted, data, tmp_path):
    settings = [f"{name}={value}" for name, value in FEW.items()]
    shown = run(
        "heal",
        converted(family),
        "--data",
        data(family),
        "--out",
        tmp_path / "out",
        "--set",
        *settings,
    ).stdout
    assert shown.strip().endswith("--audio FOLDER" if family == "whisper" else "--pairs FILE")
