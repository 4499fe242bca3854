"""Healing: what trains and by what, what is minimised, and that the result is a converted folder
like any other.
"""

import copy
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SHORT, THOROUGH, log, losses, relative, without_its_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrkv_convert.evaluate.load import load_model
from lrkv_convert.examples.example import IGNORED
from lrkv_convert.families import family_named
from lrkv_convert.healing import heal
from lrkv_convert.modeling.factors_lrkv import LowRankHeads
from lrkv_convert.train.divergence import divergence
from lrkv_convert.train.objective import mismatch
from lrkv_convert.train.optimise import MuonAdamW, groups, schedule
from lrkv_convert.train.options import Options
from lrkv_convert.train.student import choose_trained, converted_sites


@pytest.fixture(scope="session")
def healed(converted, sheep, tmp_path_factory):
    """healed(family, **options) -> folder; each combination is healed once."""
    made = {}

    def get(family="llama", **options):
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("healed") / "model"
            heal(converted(family), made[key], [str(sheep)], **{**SHORT, **options})
        return made[key]

    return get


# ------------------------------------------------------------------------- what trains, and by what


@pytest.mark.parametrize("train", ["attention", "all"])
def test_every_parameter_that_trains_is_in_exactly_one_group(converted, family, train):
    model = load_model(str(converted(family)), torch.device("cpu"))
    sites = converted_sites(family_named(model.config.model_type), model.config)
    choose_trained(model, sites, train)
    found = groups(model, "muon")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found["muon"]) | set(found["adamw"]) == trained and not set(found["muon"]) & set(
        found["adamw"]
    )
    assert all(p.ndim == 2 for p in found["muon"].values())
    assert not [name for name in found["muon"] if name.endswith(("bias", ".C", ".B", ".U.weight"))]
    heads = [
        p
        for module in model.modules()
        if isinstance(module, LowRankHeads)
        for name, p in module.named_parameters()
        if "W_shared" not in name
    ]
    kept_from_muon = {
        id(p)
        for p in (*heads, model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    }
    assert not kept_from_muon & {id(p) for p in found["muon"].values()}
    if train == "attention":
        assert (
            trained
            and all("attn" in name for name in trained)
            and any("W_shared" in name for name in found["muon"])
        )
    else:
        assert trained == {name for name, _ in model.named_parameters()}
    assert not groups(model, "adamw")["muon"] and set(groups(model, "adamw")["adamw"]) == trained


@pytest.mark.parametrize(
    "left",
    ["after", pytest.param("before", marks=pytest.mark.slow), "bin", "bare", "tied in the config"],
)
def test_what_does_not_train_is_what_was_loaded(left, converted, sheep, tmp_path):
    """A converted folder is read as transformers reads it: other files beside its weights are
    nobody's, and it may have been saved in another form.
    """
    folder = shutil.copytree(converted(), tmp_path / "in")
    weights = load_file(folder / "model.safetensors")
    if left in ("after", "before"):
        save_file(
            {name: t + 1 for name, t in weights.items()},
            folder / f"{'z' if left == 'after' else 'a'}.safetensors",
        )
    elif left == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif left == "bare":
        save_file(
            {name.removeprefix("model."): t for name, t in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    else:
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    heal(folder, tmp_path / "out", [str(sheep)], **{**SHORT, "tokens": 2 * 4 * 64})
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == weights.keys() and not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert all(torch.equal(after[name], weights[name]) for name in weights if "attn" not in name)


def test_only_attention_changes_unless_all_is_asked_for(converted, healed):
    before, after = (load_file(folder / "model.safetensors") for folder in (converted(), healed()))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("self_attn" not in name), name
    everything = load_file(healed(train="all") / "model.safetensors")
    assert not any(torch.equal(tensor, everything[name]) for name, tensor in before.items())


def test_the_schedule_warms_up_and_ends_where_it_should():
    options = Options(tokens=100 * 4 * 512, warmup=0.1, final_lr=0.2)
    steps = options.steps(512)
    made = schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0), options, steps)
    rates = []
    for _ in range(steps):
        rates.append(made.get_last_lr()[0])
        made.optimizer.step()
        made.step()
    assert 0 < rates[0] < rates[5] < rates[9] < rates[10] == 3.0 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(
        0.6, rel=0.01
    )


def test_recipe_fields_reach_the_optimisers():
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3))
    made = MuonAdamW(
        {"muon": {"a": matrix}, "adamw": {"b": vector}},
        Options(
            muon_lr=0.3,
            adamw_lr=0.2,
            momentum=0.5,
            beta1=0.8,
            beta2=0.7,
            weight_decay=0.1,
            adjust_lr="original",
        ),
    )
    muon, adamw = made.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"], muon["adjust_lr_fn"]) == (
        0.3,
        0.5,
        0.1,
        "original",
    )
    assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (0.2, (0.8, 0.7), 0.1)


def test_the_pair_steps_as_the_two_would_and_survives_saving():
    def weights():
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))

    def descend(parameters, *steppers):
        for p in parameters:
            p.grad = p.detach().cos()
        for stepper in steppers:
            stepper.step()

    options = Options(muon_lr=0.1, adamw_lr=0.05, weight_decay=0.01)
    apart, pair, later = weights(), weights(), weights()
    muon = torch.optim.Muon(
        [apart[0]],
        lr=0.1,
        weight_decay=0.01,
        momentum=options.momentum,
        adjust_lr_fn=options.adjust_lr,
    )
    adamw = torch.optim.AdamW(
        [apart[1]], lr=0.05, weight_decay=0.01, betas=(options.beta1, options.beta2)
    )
    together = MuonAdamW({"muon": {"a": pair[0]}, "adamw": {"b": pair[1]}}, options)
    for _ in range(3):
        descend(apart, muon, adamw)
        descend(pair, together)
    assert torch.equal(apart[0], pair[0]) and torch.equal(apart[1], pair[1])
    resumed = MuonAdamW({"muon": {"a": later[0]}, "adamw": {"b": later[1]}}, options)
    for p, q in zip(later, pair):
        p.data.copy_(q)
    # the state itself would be shared
    resumed.load_state_dict(copy.deepcopy(together.state_dict()))
    for _ in range(2):
        descend(pair, together)
        descend(later, resumed)
    assert torch.equal(later[0], pair[0]) and torch.equal(later[1], pair[1])


# -------------------------------------------------------------------------------- what is minimised


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_rows_that_do_not_count_change_nothing(kl_weight):
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(7, 50), torch.randn(7, 50), torch.arange(7)
    targets[[0, 3, 6]] = IGNORED
    counted = targets != IGNORED
    whole, part = student.requires_grad_(), student.detach()[counted].requires_grad_()
    found = divergence(whole, teacher, targets, kl_weight, at_once=200)
    alone = divergence(part, teacher[counted], targets[counted], kl_weight, at_once=200)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in alone], rel=1e-6)
    found[0].backward()
    alone[0].backward()
    assert torch.equal(whole.grad[counted], part.grad) and not whole.grad[~counted].any()


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_divergence_and_its_gradient_are_torchs_own(kl_weight):
    torch.manual_seed(0)
    student, teacher, targets = (
        torch.randn(7, 50, requires_grad=True),
        torch.randn(7, 50),
        torch.randint(0, 50, (7,)),
    )
    # several chunks, the last one shorter
    loss, kl, ce = divergence(student, teacher, targets, kl_weight, at_once=200)
    (3 * loss).backward()
    other = student.detach().double().requires_grad_()
    expected_kl = torch.nn.functional.kl_div(
        other.log_softmax(-1),
        teacher.double().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    expected_ce = torch.nn.functional.cross_entropy(other, targets)
    (3 * (kl_weight * expected_kl + (1 - kl_weight) * expected_ce)).backward()
    assert kl.item() == pytest.approx(expected_kl.item(), rel=1e-5) and ce.item() == pytest.approx(
        expected_ce.item(), rel=1e-5
    )
    assert relative(student.grad.double(), other.grad) < 1e-5


def test_without_a_teacher_it_is_cross_entropy():
    student, targets = torch.randn(5, 9, requires_grad=True), torch.randint(0, 9, (5,))
    loss, _, ce = divergence(student, None, targets, 0.0)
    assert (
        loss.item()
        == ce.item()
        == pytest.approx(torch.nn.functional.cross_entropy(student, targets).item(), rel=1e-5)
    )


def test_mismatch_is_relative_and_zero_for_equals():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert mismatch([a, b], [a, b]) == 0
    assert mismatch([a, 2 * b], [a, b]).item() == pytest.approx(0.5)
    assert mismatch([10 * a], [10 * b]).item() == pytest.approx(mismatch([a], [b]).item(), rel=1e-5)


def test_mismatch_is_of_what_was_read():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    read = torch.tensor([[True, True, True], [True, False, False]])
    spoilt = a.masked_fill(~read[..., None], 9.0)
    assert mismatch([spoilt], [b], read) == mismatch([a], [b], read) != mismatch([a], [b])


def test_divergence_from_the_teacher_falls(healed):
    folder = healed(tokens=60 * 4 * 64, muon_lr=2e-3, adamw_lr=2e-3)
    kl = [line["kl"] for line in log(folder) if "kl" in line]
    assert sum(kl[-10:]) < 0.8 * sum(kl[:10])
    # the default loss, with the original still there
    assert [line["loss"] for line in log(folder) if "kl" in line] == kl


def test_cross_entropy_falls_without_the_original(converted, sheep, tmp_path):
    done = heal(
        without_its_source(converted(), tmp_path / "in"),
        tmp_path / "out",
        [str(sheep)],
        **{**SHORT, "tokens": 40 * 4 * 64, "muon_lr": 3e-3, "adamw_lr": 3e-3},
    )
    found = losses(tmp_path / "out")
    assert (
        done.entry.loss == "ce"
        and done.entry.teacher is None
        and "original" not in done.entry.validation.nll.known
    )
    assert sum(found[-8:]) < 0.95 * sum(found[:8])


def test_a_mix_is_the_weighted_sum_and_matching_adds_to_it(healed):
    for line in log(healed(loss="mix", kl_weight=0.25, match_attention=0.5)):
        if "loss" in line:
            assert line["loss"] == pytest.approx(
                0.25 * line["kl"] + 0.75 * line["ce"] + 0.5 * line["match"], rel=1e-5
            )


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 4}, {"gradient_checkpointing": True}], ids=str
)
def test_how_a_step_is_computed_does_not_change_it(healed, options):
    assert losses(healed(**options)) == pytest.approx(losses(healed()), rel=1e-4)


@pytest.mark.slow
def test_matching_works_with_gradient_checkpointing(healed):
    assert losses(healed(match_attention=1.0, gradient_checkpointing=True)) == pytest.approx(
        losses(healed(match_attention=1.0)), rel=1e-4
    )


def test_bf16_follows_fp32(healed):
    assert losses(healed(precision="bf16")) == pytest.approx(losses(healed()), rel=0.2)


# --------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("llama", "gpt2") else pytest.mark.slow) for n in THOROUGH],
)
def test_a_healed_folder_is_a_converted_folder(converted, healed, name):
    before, after = converted(name), healed(name)
    names = lambda folder: {p.name for p in folder.iterdir()}
    assert (
        names(after) == names(before) | {"heal.jsonl", "heal.png"}
        and not after.with_name("model.partial").exists()
    )
    for file in names(before) - {"model.safetensors", "lrkv.json", "README.md"}:
        assert (before / file).read_bytes() == (after / file).read_bytes()
    old, new = (json.loads((folder / "lrkv.json").read_text()) for folder in (before, after))
    [entry] = new.pop("history")
    assert {k: v for k, v in old.items() if k != "history"} == new
    assert (
        entry["steps"] == 6
        and entry["tokens"] == 6 * 4 * 64
        and entry["recipe"]["optimizer"] == "muon"
    )
    card = (after / "README.md").read_text()
    assert (
        "## Healing" in card
        and "without training" not in card
        and f"{math.exp(entry['validation']['nll']['healed']):.3f}" in card
    )
    state, other = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()
    }


@pytest.mark.slow
def test_it_loads_in_a_fresh_process_without_this_package(healed, tmp_path):
    code = f"""
import sys
sys.modules["lrkv_convert"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(healed())!r}, trust_remote_code=True)
print(model.generate(**AutoTokenizer.from_pretrained({str(healed())!r},
    trust_remote_code=True)("3 sheep", return_tensors="pt"), max_new_tokens=4,
    do_sample=False)[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = (
        load_model(str(healed()), torch.device("cpu")),
        AutoTokenizer.from_pretrained(healed()),
    )
    assert (
        json.loads(done.stdout.splitlines()[-1])
        == model.generate(
            **tokenizer("3 sheep", return_tensors="pt"), max_new_tokens=4, do_sample=False
        )[0].tolist()
    )


def test_bfloat16_weights_stay_bfloat16(converted, sheep, tmp_path):
    heal(converted(dtype="bfloat16"), tmp_path / "out", [str(sheep)], **SHORT)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).dtype
        == torch.bfloat16
    )


def test_shards_are_as_large_as_asked_for(converted, sheep, tmp_path):
    heal(converted(), tmp_path / "out", [str(sheep)], max_shard_size="100KB", **SHORT)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    load_model(str(tmp_path / "out"), torch.device("cpu"))


def test_healing_goes_on_from_a_healed_model(healed, sheep, tmp_path):
    heal(healed(), tmp_path / "again", [str(sheep)], **{**SHORT, "seed": 1})
    first, second = json.loads((tmp_path / "again" / "lrkv.json").read_text())["history"]
    assert (
        second["validation"]["nll"]["converted"] != first["validation"]["nll"]["converted"]
        and second["recipe"]["seed"] == 1
    )
    card = (tmp_path / "again" / "README.md").read_text()
    assert (
        card.count("| healed |") == 2
        and card.count("heal.png") == 1
        and card.index("## Healing 2") < card.index("| before |") < card.index("heal.png")
    )


def test_validation_is_perplexity_of_the_held_out_text(converted, sheep, healed):
    entry = json.loads((healed() / "lrkv.json").read_text())["history"][0]
    from lrkv_convert.evaluate.load import load_tokenizer
    from lrkv_convert.train.windows import pack, packed

    folder = healed().parent
    pack(
        [str(sheep)],
        load_tokenizer(str(converted())),
        folder,
        seq_len=64,
        tokens=SHORT["tokens"],
        validation=None,
        validation_tokens=256,
        field="text",
        seed=0,
        vocabulary=260,
    )
    windows = packed(folder)
    assert windows.sha256 == entry["windows_sha256"]
    for name, model in (("converted", converted()), ("healed", healed())):
        loaded, nll = load_model(str(model), torch.device("cpu")), []
        for ids in windows.ids(windows.validation):
            nll.append(loaded(ids[None], labels=ids[None]).loss.item())
        assert entry["validation"]["nll"][name] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
