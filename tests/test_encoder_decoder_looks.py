"""`inspect` and `sweep` of encoder-decoders: both kinds of attention of the decoder, on pairs of
texts and on speech, against what the whole models give.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import relative, run
from encoder_decoders import converted, data, load, logits, target, tiny, write_little
from safetensors.torch import load_file, save_file

from lrkv_convert import convert
from lrkv_convert.examples.example import IGNORED, Example, tokens_of
from lrkv_convert.examples.measured import MeasuredOn, examples_of
from lrkv_convert.frontier import sweep
from lrkv_convert.inspection import inspect
from lrkv_convert.study import Study

CPU = torch.device("cpu")
FLOAT32 = 1e-4
EVERY = 10**6  # tokens
READS = {"whisper": "audio"}  # what a family is measured on: the others, pairs


def given(family: str, data) -> dict[str, str]:
    return {READS.get(family, "pairs"): data(family)}


def examples_for(study: Study, measured_on: dict[str, str]) -> list[Example]:
    material = MeasuredOn(**measured_on).read(study.model, study.family, EVERY)
    study.build(CPU)
    return examples_of(material, study.checkpoint, study.whole)


@torch.no_grad()
def scores(model, examples: list[Example], base: list | None = None) -> tuple[float, float, list]:
    """Loss, and KL from what another model thought, at the positions that count; what this one
    thinks.
    """
    logps, nll, kl, count = [], 0.0, 0.0, 0
    for n, example in enumerate(examples):
        counts = example.predicts != IGNORED
        logp = model(**example.inputs, use_cache=False).logits[0, counts].double().log_softmax(-1)
        nll -= logp.gather(1, example.predicts[counts].unsqueeze(1)).sum().item()
        kl += (base[n].exp() * (base[n] - logp)).sum().item() if base else 0.0
        count += int(counts.sum())
        logps.append(logp)
    return nll / count, kl / count, logps


# --------------------------------------------------------------------------------------- look ahead


@pytest.mark.parametrize("family", ["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def test_errors_of_keys_are_those_that_the_conversion_reports(family, tiny, data, converted):
    record = json.loads((converted(family, calibrated=True) / "lrkv.json").read_text())
    found = inspect(str(tiny(family)), ranks=[7], calibration=[data(family)])
    assert list(found["attention"]) == list(record["attention"]) == ["self", "cross"]
    assert found["calibration"]["tokens"] == record["calibration"]["tokens"]
    for kind, row in found["attention"].items():
        for layer, fitted in zip(row["layers"], record["attention"][kind]["layers"], strict=True):
            # by another way, which rounds where next to nothing is lost
            close = pytest.approx(fitted["keys"]["error"], rel=1e-4, abs=1e-5)
            assert layer["keys"]["errors"]["7"] == close
            most = layer["values"]["errors"]["7"]
            assert 0.5 * most < fitted["values"]["error"] < most
        [rank] = row["ranks"]
        assert rank["cache_ratio"] == record["attention"][kind]["cache"]["kv_ratio"]


def test_both_kinds_together_are_recommended_what_their_sum_allows(tiny, data):
    look = lambda target: inspect(str(tiny("bart")), calibration=[data("bart")], target_kl=target)
    kinds = look(0.05)["attention"]
    sums = [
        (own["rank"], own["predicted_kl"] + cross["predicted_kl"])
        for own, cross in zip(kinds["self"]["ranks"], kinds["cross"]["ranks"], strict=True)
    ]
    rank, kl = sums[2]
    assert kl > max(kinds[kind]["ranks"][2]["predicted_kl"] for kind in kinds)
    found = look(kl)
    assert found["recommended"]["rank"] == rank
    assert all(row["recommended"]["rank"] <= rank for row in found["attention"].values())
    assert found["recommended"]["cache_ratio_kl"] <= kl
    assert look(sums[3][1])["recommended"]["rank"] == sums[3][0]


# ----------------------------------------------------------------------------------------- ablation


@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow), "whisper"])
def test_removing_a_head_is_zeroing_its_columns_of_the_output_projection(family, tiny, data):
    """Of either kind of attention; the loss is that of the positions that count."""
    found = inspect(
        str(tiny(family)),
        ranks=[5],
        calibration=[data(family)],
        ablate=True,
        max_tokens=EVERY,
        **given(family, data),
    )["attention"]
    study = Study(str(tiny(family)))
    examples = examples_for(study, given(family, data))
    whole, _, base = scores(load(tiny(family)), examples)
    for site in study.sites:
        ablation, d = found[site.kind]["ablation"], site.geometry.head_dim
        assert ablation["loss"] == pytest.approx(whole, rel=1e-5)
        assert ablation["tokens"] == tokens_of(examples)
        assert len(ablation["units"]) == 6 and ablation["removals"][0]["heads"] == [1, 2]
        for unit in (unit for unit in ablation["units"] if unit["layer"] == site.layer):
            model = load(tiny(family))
            projection = model.get_submodule(site.path).get_submodule(site.adapter.output).weight
            with torch.no_grad():
                projection[:, unit["head"] * d : (unit["head"] + 1) * d].zero_()
            loss, kl, _ = scores(model, examples, base)
            assert unit["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6) and kl > 1e-5
            assert unit["loss_increase"] == pytest.approx(loss - whole, abs=1e-4)


def test_positions_that_do_not_count_are_left_out_of_the_loss(tiny, data):
    """Of what a decoder is given before it writes."""
    from lrkv_convert.inspection.ablate import WholeModel

    study = Study(str(tiny("t5")))
    examples = examples_for(study, {"pairs": data("t5")})[:3]
    for example in examples:
        example.predicts[:4] = IGNORED
    removed = load(tiny("t5"))
    path, d = study.by_kind["cross"][0].path, study.sites[0].geometry.head_dim
    with torch.no_grad():
        removed.get_submodule(path).o.weight[:, 2 * d :].zero_()
    whole, _, base = scores(load(tiny("t5")), examples)
    loss, kl, _ = scores(removed, examples, base)
    with WholeModel(study.skeleton, study.sites, examples) as model:
        assert model.loss == pytest.approx(whole, rel=1e-5)
        found = model.without("cross", [(0, 2)])
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.increase == pytest.approx(loss - whole, abs=1e-4)


# ----------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize("family", ["bart", "marian", "pegasus", "t5", "whisper"])
def test_a_conversion_of_full_rank_keeps_everything(family, data, converted):
    found = inspect(str(converted(family, rank=20, force=True)), **given(family, data))
    assert list(found["attention"]) == ["self", "cross"]
    for row in found["attention"].values():
        assert row["similarity"] == pytest.approx(1, abs=1e-6) and row["logit_error"] < FLOAT32
        assert abs(row["attention_kl"]) < 1e-7 and row["output_error"] < FLOAT32


def mild(folder: Path, out: Path) -> Path:
    """A copy whose decoder looks at more than one thing, so that no attention is rounded to 0."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    for name, tensor in state.items():
        if "decoder" in name and (".q." in name or ".q_proj." in name):
            tensor *= 0.1
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def attended(model, path: str, examples: list[Example]) -> list[tuple]:
    """What an attention module gives on every example, output and weights, run in the model."""
    found = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: found.append((output[0][0], output[-1][0].double()))
    )
    with torch.no_grad():
        for example in examples:
            model(**example.inputs, use_cache=False)
    hook.remove()
    return found


@pytest.mark.parametrize("family", ["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def test_errors_are_those_of_both_models_run_whole(family, tiny, data, tmp_path):
    """With the original's attention everywhere before, both whole models see the same in each
    attention module; T5 with its position bias.
    """
    original, folder = mild(tiny(family), tmp_path / "mild"), tmp_path / "out"
    convert(str(original), folder, rank=7, calibration=[])
    study = Study(str(original))
    examples = examples_for(study, given(family, data))
    found = inspect(str(folder), **given(family, data), max_tokens=EVERY)["attention"]
    one, other = (load(f, attn_implementation="eager") for f in (original, folder))
    for site in study.sites:  # self-attention of a layer, then its cross-attention
        kl, missed, size, queries, wrong, whole = 0, 0, 0, 0, 0, 0
        seen_by = (attended(model, site.path, examples) for model in (one, other))
        for (out, a), (other_out, b) in zip(*seen_by, strict=True):
            assert torch.equal(a > 0, b > 0)  # (n, T, S)
            seen = a > 0
            logs = [torch.where(seen, w.log(), 0.0) for w in (a, b)]
            kl += (a * (logs[0] - logs[1])).sum((1, 2))
            centred = [
                torch.where(seen, w - w.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True), 0.0)
                for w in logs
            ]
            missed += (centred[0] - centred[1]).square().sum((1, 2))
            size += centred[0].square().sum((1, 2))
            queries += a.shape[1]
            wrong += (out - other_out).square().sum()
            whole += out.square().sum()
        row = found[site.kind]["layers"][site.layer]
        assert relative(torch.tensor(row["attention_kl"]).double(), kl / queries) < 1e-3
        assert relative(torch.tensor(row["logit_error"]).double(), (missed / size).sqrt()) < 1e-3
        assert row["output_error"] == pytest.approx((wrong / whole).sqrt().item(), rel=1e-3)
        assert min(row["attention_kl"]) > 1e-6 and min(row["logit_error"]) > 1e-3
        parent, _, name = site.path.rpartition(".")
        same = copy.deepcopy(one.get_submodule(site.path))
        if family == "t5" and site.kind == "cross":  # a converted one hands no bias of zeros on
            same.register_forward_hook(lambda module, args, output: (output[0], None, output[-1]))
        setattr(other.get_submodule(parent), name, same)


def test_a_converted_t5_runs_in_float64(converted):
    """Its position bias is added to a mask of the smallest numbers there are."""
    one, other = (load(converted("t5"), dtype) for dtype in (torch.float32, torch.float64))
    assert relative(logits(other, target()), logits(one, target()).double()) < FLOAT32


def test_a_kind_that_was_left_as_it_was_is_not_compared(data, converted):
    found = inspect(str(converted("bart", attention="cross")), pairs=data("bart"), max_tokens=60)
    assert list(found["attention"]) == ["cross"] and found["tokens"] < 90
    assert found["attention"]["cross"]["similarity"] < 0.999


# -------------------------------------------------------------------------------------------- sweep


@pytest.mark.parametrize(
    "family", ["bart", "marian", "pegasus", pytest.param("t5", marks=pytest.mark.slow), "whisper"]
)
def test_a_point_of_the_sweep_is_the_conversion_of_that_rank(family, tiny, data, converted):
    found = sweep(
        str(tiny(family)),
        [7],
        methods=["lrkv"],
        calibration=[data(family)],
        device=CPU,
        **given(family, data),
    )
    folder = converted(family, calibrated=True)
    examples = examples_for(Study(str(tiny(family))), given(family, data))
    before, _, base = scores(load(tiny(family)), examples)
    after, kl, _ = scores(load(folder), examples, base)
    [point] = found["points"]
    assert found["base_perplexity"] == pytest.approx(torch.tensor(before).exp().item(), rel=1e-3)
    assert point["ratio"] == pytest.approx(torch.tensor(after - before).exp().item(), rel=1e-3)
    assert point["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-7)
    record = json.loads((folder / "lrkv.json").read_text())
    for row in record["attention"].values():
        assert point["cache_ratio"] == pytest.approx(row["cache"]["kv_ratio"])
    assert found["attention"] == ["self", "cross"] and found["seq_len"] is None
    counted = sum(int((example.predicts != IGNORED).sum()) for example in examples)
    assert found["tokens"] == counted


# --------------------------------------------------------------------------------- from the command


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_inspect_from_the_command_line(family, tiny, data, converted, tmp_path):
    option = f"--{READS.get(family, 'pairs')}"
    shown = run(
        "inspect",
        tiny(family),
        "--calibration",
        data(family),
        "--ablate",
        option,
        data(family),
        "--target-kl",  # T5's random keys are too sharp for eight bits
        1,
        "--out",
        tmp_path / "look",
    ).stdout
    read = lambda: json.loads((tmp_path / "look" / "inspect.json").read_text())
    lines = [x for x in shown.splitlines() if not x.startswith(("next: ", "written: "))]
    assert max(map(len, lines)) <= 100 and "…" not in shown
    assert "decoder self-attention, 2 layers" in shown and "cross-attention, 2 layers" in shown
    assert f"--calibration {data(family)}" in shown and "Both together" in shown
    parts = ["geometry", "ranks", "recommended", "diversity", "layers", "ablation"]
    assert [list(row) for row in read()["attention"].values()] == [parts, parts]
    pytest.importorskip("matplotlib")
    for name in ("heads.png", "ablation.png"):
        assert (tmp_path / "look" / name).stat().st_size > 10_000
    folder = converted(family, calibrated=True)
    shown = run("inspect", folder, option, data(family), "--out", tmp_path / "look").stdout
    for row in read()["attention"].values():
        assert f"similarity {row['similarity']:.3f}" in shown
    assert "calibrated on" in shown and read()["text"]["calibrated_on"]


def test_texts_are_read_where_nothing_is_named(tiny, converted):
    """The text that ships here: its paragraphs are sources, and the model writes targets."""
    shown = run("inspect", tiny("t5"), "--calibration-tokens", 100, "--ranks", 5).stdout
    assert "cross-attention" in shown
    assert "built-in" in run("inspect", converted("t5"), "--max-tokens", 60).stdout


@pytest.mark.slow
def test_sweep_from_the_command_line(tiny, data, tmp_path):
    shown = run(
        "sweep",
        tiny("whisper"),
        "--ranks",
        "3,7",
        "--methods",
        "budget,lrkv,latent:whitened",
        "--calibration",
        data("whisper"),
        "--audio",
        data("whisper"),
        "--out",
        tmp_path / "out",
    ).stdout
    assert "latent (whitened)" in shown and "windows" not in shown
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert len(points) == 6 and all(0 < point["cache_ratio"] < 1 for point in points)


@pytest.mark.parametrize(
    "words, says",
    [
        ("inspect {t5} --ablate --audio {speech}", "give --pairs FILE"),
        ("inspect {t5} --ablate --text {text}", "give --pairs FILE"),
        ("inspect {t5} --ablate --text {text} --pairs {pairs}", "nothing else to measure on"),
        ("inspect {whisper} --calibration {speech} --ablate --pairs {pairs}", "--audio FOLDER"),
        ("inspect {t5} --pairs {pairs}", "--ablate measures"),
        ("inspect {whisper}", "calibrated on speech"),
        ("inspect {whisper} --calibration none", "without calibration text"),
        ("inspect {half}", "--audio FOLDER"),
        ("inspect {half} --original {t5} --audio {speech}", "family or shapes differ"),
        ("sweep {t5} --out {out} --text {text}", "encoder-decoder"),
        ("sweep {t5} --out {out}", "give --pairs FILE"),
        ("sweep {whisper} --out {out} --pairs {pairs}", "reads speech"),
        ("sweep {t5} --out {out} --pairs {pairs} --seq-len 64", "--seq-len does not go with"),
        ("sweep {t5} --out {out} --pairs {pairs} --ranks 21", "out of range"),
        ("sweep {t5} --out {out} --pairs {pairs} --ranks 5 --calibration none", "there is none"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words,
    says,
    tiny,
    data,
    converted,
    tmp_path,
):
    places = {
        "t5": tiny("t5"),
        "whisper": tiny("whisper"),
        "pairs": data("t5"),
        "speech": data("whisper"),
        "half": converted("whisper"),
        "text": __file__,
        "out": tmp_path / "out",
    }
    error = run(*(word.format(**places) for word in words.split()), code=1).stderr.strip()
    assert len(error.splitlines()) == 1 and says in error, error
    assert not (tmp_path / "out").exists()


def test_pairs_that_are_missing_are_refused(tiny, tmp_path):
    command = ("sweep", tiny("t5"), "--out", tmp_path / "out", "--pairs", tmp_path / "no.jsonl")
    assert "cannot read" in run(*command, code=1).stderr
