"""Adapters on converted models: the usual list of layers means all of attention, and PEFT does with
the one the card prints what its reader expects."""

import json
import re

import peft
import pytest
import torch
from conftest import prompt, relative, uneven
from encoder_decoders import build as build_encoder_decoder
from families import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lrkv_convert import LrkvError, convert, lora_targets
from lrkv_convert.families import FAMILIES as KNOWN
from lrkv_convert.folder.record import read_record
from lrkv_convert.lora import USUAL, attention_targets

FACTORS = ["keys.W_shared", "keys.U", "values.W_shared", "values.U"]
FAMILIES = ("llama", "gpt2", "gpt_neox")


@pytest.fixture(scope="session")
def made(converted):
    """made(family, **options) -> folder, converted by the weights alone."""
    return lambda family="llama", **options: converted(family, calibration=[], **options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def listed(folder) -> list[str]:
    """target_modules as the card has it."""
    return json.loads(re.search(r"target_modules=(\[.*?\])", (folder / "README.md").read_text())[1])


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neo"])
def test_the_card_lists_what_the_usual_names_mean(family, made):
    folder = made(family)
    assert (
        sorted(listed(folder))
        == sorted(lora_targets(folder))
        == sorted(lora_targets(load(folder), ["q_proj", "k_proj", "v_proj", "o_proj"]))
    )
    assert set(FACTORS) < set(listed(folder))


@pytest.mark.parametrize(
    "family", [family for family in CONFIGS if "-" not in family and family != "gpt_neo"]
)  # which lists its layers: below
def test_the_usual_names_mean_every_layer_of_attention_in_every_family(family):
    model, adapter = uneven(family), KNOWN[family].any
    targets = lora_targets(model)
    assert targets == [adapter.query, *FACTORS, adapter.output]
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f".{adapter.attention}." in name
    ]
    assert layers and all(any(name.endswith("." + target) for target in targets) for name in layers)
    assert lora_targets(model, list(adapter.projections)) == [adapter.query, *FACTORS]


@pytest.mark.parametrize(
    "family, name, means",
    [
        ("llama", "k_proj", FACTORS[:2]),
        ("llama", "v_proj", FACTORS[2:]),
        ("llama", "q_proj", ["q_proj"]),
        ("llama", "up_proj", ["up_proj"]),
        ("gpt2", "c_attn", ["q_attn", *FACTORS]),
        ("gpt2", "c_proj", ["c_proj"]),
        ("gpt_neox", "query_key_value", ["q_proj", *FACTORS]),
        ("gpt_neox", "o_proj", ["dense"]),
        ("phi3", "qkv_proj", ["q_proj", *FACTORS]),
        ("llama", "values.U", ["values.U"]),
        (
            "llama",
            "layers.1.self_attn.k_proj",
            [f"layers.1.self_attn.{name}" for name in FACTORS[:2]],
        ),
    ],
)
def test_a_name_of_the_source_becomes_the_layers_that_took_its_place(family, name, means, made):
    assert lora_targets(made(family), [name]) == lora_targets(made(family), name) == means


@pytest.mark.parametrize("name", ["k_porj", "", "proj", "layers.9.self_attn.k_proj", "all-linear"])
def test_a_name_that_matches_nothing_is_refused(name, made):
    with pytest.raises(LrkvError, match="nor was one of its source.*keys.W_shared"):
        lora_targets(made(), [*USUAL, name])


def test_what_is_not_converted_is_refused(tiny):
    for model in (tiny(), load(tiny())):
        with pytest.raises(LrkvError, match="is no converted model"):
            lora_targets(model)


@pytest.mark.parametrize(
    "options",
    [{"base_width": 0}, {"rank": 0, "base_width": 30}, {"keys": "full"}, {"base": "aligned"}],
    ids=str,
)
def test_only_layers_that_are_there_are_listed(options, made):
    folder = made(**options)
    assert sorted(listed(folder)) == sorted(lora_targets(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_listed_learns_and_merges_and_is_loaded_again(family, made, tmp_path):
    targets = listed(made(family))
    model = peft.get_peft_model(
        load(made(family)),
        peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM", init_lora_weights=True),
    )
    adapted = {
        name.removesuffix(".lora_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    }
    assert {
        target for target in targets if any(name.endswith("." + target) for name in adapted)
    } == set(targets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B begins at zero, so that A learns in the second step
        optimizer.zero_grad()
        model(prompt(), labels=prompt()).loss.backward()
        optimizer.step()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if ".lora_B." in name and parameter.abs().max() > 0
    }
    assert len(moved) == len(adapted)
    with torch.no_grad():
        tuned, before = model(prompt()).logits, load(made(family))(prompt()).logits
        assert relative(tuned, before) > 1e-6
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load(made(family)), tmp_path / "adapter").eval()
        assert relative(again(prompt()).logits, tuned) < 1e-6
        assert (
            relative(model.merge_and_unload()(prompt()).logits, tuned) < 1e-4
        )  # sums in another order
        assert (
            relative(
                peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
                .eval()(prompt())
                .logits,
                tuned,
            )
            < 1e-6
        )


def test_in_an_encoder_decoder_the_encoder_is_adapted_too(tmp_path):
    source = build_encoder_decoder("bart", tmp_path / "source")
    for attention in ("self,cross", "cross"):
        out = tmp_path / attention
        convert(str(source), out, rank=3, calibration=[], attention=attention)
        named = sorted(attention_targets(read_record(out)))
        assert sorted(listed(out)) == named == sorted(lora_targets(out))
        assert {"q_proj", "k_proj", "v_proj", "out_proj", *FACTORS} == set(listed(out))
