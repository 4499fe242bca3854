"""What must hold for every family and variant (families.py): one class, run for each of them."""
import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import build, prompt, relative
from families import CONFIGS
from safetensors.torch import load_file
from test_model import FLOAT32, FLOAT64, STEPS, load, logits, step_by_step
from transformers import DynamicCache

from lrkv_convert import convert
from lrkv_convert.conversion import open_model
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes
from lrkv_convert.inspection.fidelity import key_heads
from lrkv_convert.modeling.factors_lrkv import LowRankHeads

QUICK = dict(calibration=[])        # the weights alone


@pytest.mark.parametrize("family", CONFIGS)
class TestFamily:
    def test_weights_are_put_together_again(self, family, tiny):
        """Heads hold every number of the original's projections, each once, where the adapter says."""
        checkpoint, adapter = open_model(str(tiny(family)))
        weights, at = adapter.split(checkpoint.tensor, 0, checkpoint.config), adapter.module(0)
        sides = {}
        for kind, (W, b, rows) in enumerate(zip((weights.W_Q, weights.W_K, weights.W_V), (weights.b_Q, weights.b_K, weights.b_V), adapter.rows(checkpoint.config))):
            name = at + adapter.projections[kind if len(adapter.projections) == 3 else 0]
            for end, flat in ((".weight", W.movedim(-2, 0).flatten(1)), (".bias", b if b is None else b.reshape(1, -1))):
                if flat is not None:
                    whole = sides.setdefault(name + end, {})
                    whole.update(zip(rows.flatten().tolist(), flat.T))
        for name, columns in sides.items():
            stored = checkpoint.tensor(name)
            stored = stored if stored.dim() == 2 and adapter.transposed else stored.T if stored.dim() == 2 else stored.unsqueeze(0)
            assert torch.equal(torch.stack([columns[i] for i in range(len(columns))], dim=1), stored)
        assert {name for name in checkpoint.tensors if name.startswith(at)} >= set(sides)

    def test_full_rank_is_exact(self, family, tiny, converted):
        g = geometry(tiny(family))
        ours = load(converted(family, rank=g.head_dim, force=True, **QUICK))
        assert relative(logits(ours, prompt()), logits(load(tiny(family)), prompt())) < FLOAT32

    def test_full_rank_is_exact_in_float64(self, family, tmp_path, monkeypatch):
        source = build(family, tmp_path / "source", dtype=torch.float64)
        convert(str(source), tmp_path / "out", rank=geometry(source).head_dim, force=True, **QUICK)
        models = [load(folder, experts_implementation="eager") for folder in (tmp_path / "out", source)]       # grouped products know no float64
        monkeypatch.setattr(torch, "float32", torch.float64)        # families round norms, tables and scores to float32, which would hide the algebra
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        assert relative(*(logits(model, prompt()) for model in models)) < FLOAT64

    def test_the_error_of_the_fit_is_that_of_the_weights(self, family, tiny, converted):
        """At rank 7 the keys that the written factors stand for miss the original's by what the fit says, and the record says it too."""
        folder = converted(family, metric="plain", refit=False, **QUICK)
        checkpoint, adapter = open_model(str(tiny(family)))
        layer = load(folder).get_submodule(adapter.layer_path)[1]
        W = adapter.split(checkpoint.tensor, 1, checkpoint.config).W_K.double()
        missed = ((key_heads(layer.get_submodule(adapter.attention).keys) - W).norm() / W.norm()).item()
        recorded = json.loads((folder / "lrkv.json").read_text())["layers"][1]["keys"]["error"]
        assert missed == pytest.approx(recorded, rel=1e-3) and 0.01 < missed < 1

    def test_cached_equals_uncached(self, family, converted):
        model, ids = load(converted(family)), prompt(50, batch=2)
        assert relative(step_by_step(model, ids, 30), logits(model, ids, use_cache=False)) < STEPS

    def test_left_padding_changes_nothing(self, family, converted):
        model, ids, pad = load(converted(family)), prompt(40, batch=2), 9
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[1, :pad], padded[1, pad:], mask[1, :pad] = 258, ids[1, :-pad], 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache, pieces = DynamicCache(config=model.config), []
        for start, stop in [(0, 30)] + [(t, t + 1) for t in range(30, 40)]:
            given = {"position_ids": positions[:, start:stop]} if takes_positions(model) else {}
            pieces.append(model(padded[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, **given).logits)
        out = torch.cat(pieces, dim=1).detach()
        assert relative(out[0], logits(model, ids[:1], use_cache=False)[0]) < STEPS
        assert relative(out[1, pad:], logits(model, ids[1:, :-pad], use_cache=False)[0]) < STEPS

    def test_it_generates_the_same_with_and_without_a_cache(self, family, converted):
        model = load(converted(family))
        greedy = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=258)
        assert torch.equal(model.generate(prompt(12), **greedy), model.generate(prompt(12), use_cache=False, **greedy))

    def test_allocated_bytes_equal_the_formula(self, family, converted):
        model = load(converted(family))
        by_hand = 4 * sum(m + module.num_heads * r for module in model.modules() if isinstance(module, LowRankHeads) for m, r in [(module.base_width, module.rank)])
        assert cache_bytes(model(prompt(10), use_cache=True).past_key_values) == 10 * by_hand
        assert formula_bytes(model.config, 4) == by_hand

    def test_a_training_step_reaches_every_factor(self, family, converted):
        model, ids = load(converted(family)).train(), prompt(30)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        before = model(ids, labels=ids).loss
        before.backward()
        still = [name for name, p in model.named_parameters() if "keys." in name or "values." in name if p.grad is None or not p.grad.any()]
        assert not [name for name in still if not name.endswith("keys.bias")]       # a bias of keys alone, without rotation, changes no softmax
        optimizer.step()
        assert model(ids, labels=ids).loss < before


def geometry(folder):
    checkpoint, adapter = open_model(str(folder))
    return adapter.geometry(checkpoint.config)


def takes_positions(model) -> bool:
    original = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))
    return "position_ids" in inspect.signature(original.forward).parameters


LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM
assert "lrkv_convert" not in sys.modules
ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
out = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    out[folder] = model(ids).logits[0, -1].tolist()
print(json.dumps(out))
"""


def test_all_load_in_a_fresh_process_without_this_package(converted, tmp_path):
    folders = {str(converted(family)): family for family in CONFIGS}
    environment = {"HF_MODULES_CACHE": str(tmp_path), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    blocked = "import sys; sys.modules['lrkv_convert'] = None\n" + LOAD.replace('assert "lrkv_convert" not in sys.modules\n', "")
    result = subprocess.run([sys.executable, "-c", blocked, *folders], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, last in json.loads(result.stdout.strip().splitlines()[-1]).items():
        assert relative(torch.tensor(last), logits(load(folder), prompt(40))[0, -1]) < FLOAT32, folders[folder]
