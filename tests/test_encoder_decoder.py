"""Encoder-decoders: what must hold for every family, in decoder self- and cross-attention; tiny
models of odd sizes whose stacks differ in depth and heads.
"""

import json
import shutil
from functools import lru_cache

import pytest
import torch
from conftest import relative
from encoder_decoders import (
    CONFIGS,
    FLOAT32,
    FLOAT64,
    STEPS,
    build,
    converted,
    corpora,
    data,
    load,
    logits,
    source,
    stepwise,
    target,
    tiny,
    write_little,
)
from safetensors.torch import load_file, save_file

from lrkv_convert import convert
from lrkv_convert.evaluate import compare
from lrkv_convert.evaluate.memory import bytes_by_kind, formula_bytes_by_kind
from lrkv_convert.examples.example import pair
from lrkv_convert.families import FAMILIES, KINDS
from lrkv_convert.folder.store import Store
from lrkv_convert.observe import calibrate as calibration
from lrkv_convert.observe import sensitivity
from lrkv_convert.observe.sensitivity import SEED, draw
from lrkv_convert.source import open_checkpoint
from lrkv_convert.study import Study


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_positions_that_the_checkpoint_holds_are_read(stack, shift, tiny, tmp_path):
    """Old Marian checkpoints hold the sinusoids that the class makes; others are kept, as
    transformers reads them.
    """
    folder, name = (
        shutil.copytree(tiny("marian"), tmp_path / "in"),
        f"model.{stack}.embed_positions.weight",
    )
    held = load(folder).get_submodule(name.rpartition(".")[0]).create_weight() + shift
    weights = load_file(folder / "model.safetensors") | {name: held}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    assert (name in load_file(tmp_path / "out" / "model.safetensors")) == bool(shift)
    ours, theirs = (logits(load(each), target()) for each in (tmp_path / "out", folder))
    assert relative(ours, theirs) < FLOAT32


@pytest.mark.parametrize("family", ["t5-gated", "bart"])
@pytest.mark.parametrize("kept", [("encoder",), ("decoder",), ("encoder", "decoder")], ids=str)
def test_copies_of_an_embedding_that_is_not_there(family, kept, tiny, tmp_path):
    """The first that is there counts for all that are like it; an output layer of its own does not
    become it.
    """
    folder, base = (
        shutil.copytree(tiny(family), tmp_path / "in"),
        ("" if family == "t5-gated" else "model."),
    )
    weights = load_file(folder / "model.safetensors")
    embedding = weights.pop(f"{base}shared.weight")
    head = {"lm_head.weight": torch.randn(embedding.shape) / 7}
    copies = {f"{base}{stack}.embed_tokens.weight": embedding.clone() for stack in kept}
    save_file(weights | copies | head, folder / "model.safetensors", metadata={"format": "pt"})
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    ours, theirs = (logits(load(each), target()) for each in (tmp_path / "out", folder))
    assert relative(ours, theirs) < FLOAT32


@pytest.mark.parametrize("family", CONFIGS)
class TestFamily:
    def test_heads_are_those_that_the_model_makes(self, family, tiny):
        """Queries, keys and values of every head, from the adapter's weights, equal what the
        model's own projections give; so does the output.
        """
        model, checkpoint = load(tiny(family)), open_checkpoint(str(tiny(family)))
        kinds = FAMILIES[checkpoint.config.model_type].kinds
        for kind in KINDS:
            adapter, seen = kinds[kind], {}
            attention = model.get_submodule(adapter.module(1).rstrip("."))
            hooks = [
                attention.get_submodule(name).register_forward_hook(
                    lambda m, args, out, name=name: seen.update({name: (args[0], out)})
                )
                for name in (*adapter.projections, adapter.output)
            ]
            logits(model, target())
            for hook in hooks:
                hook.remove()
            weights = adapter.split(checkpoint.tensor, 1, checkpoint.config)
            for name, W, b in zip(
                adapter.projections,
                (weights.W_Q[:, 0], weights.W_K, weights.W_V),
                (weights.b_Q, weights.b_K, weights.b_V),
            ):
                x, made = seen[name]
                ours = torch.einsum("ntd,hde->nthe", x, W) + (
                    0 if b is None else b.reshape(W.shape[0], -1)
                )
                assert relative(ours.flatten(2), made) < 1e-5
            x, made = seen[adapter.output]
            bias = attention.get_submodule(adapter.output).bias
            assert (
                relative(x @ weights.W_O.flatten(0, 2) + (0 if bias is None else bias), made) < 1e-5
            )
            assert (
                adapter.geometry(checkpoint.config).kv_heads == 3
                and adapter.geometry(checkpoint.config).head_dim == 20
            )

    def test_full_rank_is_exact(self, family, tiny, converted):
        ours, original = load(converted(family, rank=20, force=True)), load(tiny(family))
        assert relative(logits(ours, target()), logits(original, target())) < FLOAT32
        given, greedy = source(original, 2), dict(max_new_tokens=8, do_sample=False, num_beams=1)
        # T5's cache has as many layers as its encoder
        assert torch.equal(
            ours.generate(**given, **greedy), original.generate(**given, **greedy, use_cache=False)
        )

    def test_full_rank_is_exact_in_float64(self, family, tmp_path, monkeypatch):
        original = build(family, tmp_path / "source", dtype=torch.float64)
        convert(str(original), tmp_path / "out", rank=20, force=True, calibration=[])
        models = [load(folder) for folder in (tmp_path / "out", original)]
        # norms and softmax are rounded to float32, which would hide the algebra
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        assert relative(*(logits(model, target()) for model in models)) < FLOAT64

    @pytest.mark.parametrize("attention", ["self", "cross", "self,cross"])
    def test_cached_equals_uncached(self, family, converted, attention):
        model = load(converted(family, attention=attention))
        for kind, field in zip(KINDS, ("lrkv", "lrkv_cross")):
            assert (getattr(model.config, field) is not None) == (kind in attention.split(","))
        ids = target(2, 12)
        for first in (1, 5):
            assert relative(stepwise(model, ids, first)[0], logits(model, ids)) < STEPS

    def test_paths_agree(self, family, converted):
        folder, ids = converted(family), target(2, 12)
        expected = logits(load(folder, lrkv_path="rebuild", attn_implementation="eager"), ids)
        for path in ("rebuild", "split"):
            for implementation in ("eager", "sdpa"):
                model = load(folder, lrkv_path=path, attn_implementation=implementation)
                assert (
                    relative(logits(model, ids), expected) < STEPS
                    and relative(stepwise(model, ids, 5)[0], expected) < STEPS
                )

    def test_padding_changes_nothing(self, family, converted):
        """Sources are padded on the right, what the decoder was given on the left."""
        model, ids, pad = load(converted(family)), target(2, 12), 4
        given = source(model, 2)
        mask = None
        if "input_ids" in given:
            mask = torch.ones_like(given["input_ids"])
            mask[1, -pad:] = 0
        short = {
            name: value if mask is None else value[:, :-pad]
            for name, value in source(model, 2).items()
        }
        out, _ = stepwise(model, ids, 5, given=given, mask=mask)
        alone = logits_of(model, {name: value[1:] for name, value in short.items()}, ids[1:])
        assert relative(out[1:], alone) < STEPS
        # in the others what lies before a token counts as its position, padding or not, as in the
        # original
        if family.startswith("t5"):
            padded, seen = (
                torch.cat((torch.full((2, pad), 258), ids), dim=1),
                torch.cat((torch.zeros(2, pad), torch.ones(2, 12)), dim=1).long(),
            )
            assert (
                relative(
                    stepwise(model, padded, pad + 5, decoder_mask=seen, given=given, mask=mask)[0][
                        :, pad:
                    ],
                    out,
                )
                < STEPS
            )

    def test_it_generates_the_same_with_and_without_a_cache(self, family, converted):
        model = load(converted(family))
        given, plain = source(model, 2), dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for beams in (1, 3):
            assert torch.equal(
                model.generate(**given, **plain, num_beams=beams),
                model.generate(**given, **plain, num_beams=beams, use_cache=False),
            )
        static = model.generate(
            **given, **plain, num_beams=1, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(static, model.generate(**given, **plain, num_beams=1))

    def test_allocated_bytes_equal_the_formula(self, family, converted):
        """Cross-attention's are written once, whatever the number of steps."""
        model, ids = load(converted(family, attention="self,cross")), target(2, 12)
        formula = formula_bytes_by_kind(model.config, 4)
        assert formula == dict.fromkeys(KINDS, 4 * 2 * 2 * (20 + 3 * 7))
        _, cache = stepwise(model, ids, 3)
        positions = 50 if family == "whisper" else 11
        held = {"self": 2 * 12 * formula["self"], "cross": 2 * positions * formula["cross"]}
        assert bytes_by_kind(cache) == held
        one_kind = formula_bytes_by_kind(load(converted(family, attention="cross")).config, 4)
        assert one_kind == {"self": 4 * 2 * 2 * 60, "cross": formula["cross"]}

    def test_a_training_step_reaches_every_factor(self, family, converted):
        model, ids = load(converted(family)).train(), target(2, 12)
        loss = lambda: model(**source(model, 2), labels=ids).loss
        before = loss()
        before.backward()
        still = [
            name
            for name, p in model.named_parameters()
            if (".keys." in name or ".values." in name) and (p.grad is None or not p.grad.any())
        ]
        # a bias of keys without rotation changes no softmax
        assert not [name for name in still if not name.endswith("keys.bias")]
        torch.optim.SGD(model.parameters(), lr=1e-4).step()
        assert loss() < before


@torch.no_grad()
def logits_of(model, given, ids):
    return model(**given, decoder_input_ids=ids, use_cache=False).logits


# -------------------------------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def observed(tiny, tmp_path_factory):
    """observed(family) -> (study, model, sources, targets, store) after calibration and
    gradients on three examples of different lengths.
    """

    def get(family: str):
        study = Study(str(tiny(family)))
        skeleton = study.build(torch.device("cpu"))
        model = load(tiny(family), attn_implementation="eager")
        sources = [next(iter(source(model, 1, length).values())) for length in (7, 11, 5)]
        targets = [target(1, length)[0] for length in (6, 4, 9)]
        # what comes last is predicted and not read
        examples = [pair(x, torch.cat((ids, ids[:1])), 1) for x, ids in zip(sources, targets)]
        store, rows = Store(tmp_path_factory.mktemp("store") / "work", {}), [0, 1, 2]
        metrics = {"fisher", "attention", "whitened"}
        calibration.calibrate(skeleton, study.sites, examples, metrics, store, rows)
        sensitivity.head_moments(skeleton, study.sites, examples, rows, store)
        return study, model, sources, targets, store

    return lru_cache(None)(get)


def observed_at(study: Study, store: Store, kind: str, layer: int) -> calibration.Observed:
    """One attention module as calibration saw it."""
    return study.seen(store, next(s for s in study.by_kind[kind] if s.layer == layer))


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "whisper"])
def test_sums_are_those_of_the_whole_model(family, observed):
    """Streamed layer by layer, and from what the whole model attends to, in both kinds of
    attention.
    """
    study, model, sources, targets, store = observed(family)
    H, tokens = 3, sum(map(len, targets))
    expected = {kind: {"keys": 0, "values": 0, "queries": 0, "inputs": 0} for kind in KINDS}
    for x, ids in zip(sources, targets):
        seen = {}
        hooks = [
            model.get_submodule(adapter.module(1) + adapter.projections[0]).register_forward_hook(
                lambda m, args, out, kind=kind: seen.update({kind: (args[0][0], out[0])})
            )
            for kind, adapter in study.family.kinds.items()
        ]
        with torch.no_grad():
            out = model(
                **{model.main_input_name: x},
                decoder_input_ids=ids[None],
                output_attentions=True,
                use_cache=False,
            )
        for hook in hooks:
            hook.remove()
        # (H, T, S)
        for kind, attention in (
            ("self", out.decoder_attentions[1][0]),
            ("cross", out.cross_attentions[1][0]),
        ):
            states = out.encoder_last_hidden_state[0] if kind == "cross" else seen[kind][0]
            sums = expected[kind]
            sums["keys"] = sums["keys"] + torch.einsum("hts,sd,se->de", attention, states, states)
            # (H, T, D)
            z = attention @ states
            sums["values"] = sums["values"] + torch.einsum("htd,hte->de", z, z)
            q = seen[kind][1].view(len(ids), H, -1)
            sums["queries"] = sums["queries"] + torch.einsum("thd,the->hde", q, q)
            sums["inputs"] = sums["inputs"] + states.T @ states * (len(ids) / len(states))
    for kind in KINDS:
        layer = observed_at(study, store, kind, 1)
        assert layer.sums["tokens"] == tokens
        for name, value in expected[kind].items():
            assert relative(layer.sums[name], value) < 1e-4, (kind, name)


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "whisper"])
def test_moments_are_those_of_the_whole_model(family, observed):
    """Gradients of the loss of tokens drawn from the model, layer by layer and through all of it at
    once.
    """
    study, model, sources, targets, store = observed(family)
    generator, expected = torch.Generator().manual_seed(SEED), {}
    for x, ids in zip(sources, targets):
        seen, hooks = {}, []
        for kind, adapter in study.family.kinds.items():
            attention = model.get_submodule(adapter.module(0).rstrip("."))
            hooks.append(
                attention.get_submodule(adapter.key_projection).register_forward_hook(
                    lambda m, args, out, kind=kind: seen.update({(kind, 0): out})
                )
            )
            hooks.append(
                attention.get_submodule(adapter.output).register_forward_pre_hook(
                    lambda m, args, kind=kind: seen.update({(kind, 1): args[0]})
                )
            )
        logits = model.requires_grad_(True)(
            **{model.main_input_name: x}, decoder_input_ids=ids[None], use_cache=False
        ).logits[0]
        for hook in hooks:
            hook.remove()
        change = logits.detach().softmax(-1)
        change.scatter_add_(
            1, drawn := draw(change, generator), torch.full_like(drawn, -1, dtype=change.dtype)
        )
        for name, g in zip(seen, torch.autograd.grad(logits, list(seen.values()), change)):
            g = g[0].view(-1, 3, 20)
            expected[name] = expected.get(name, 0) + torch.einsum("nhd,nhe->hde", g, g) / sum(
                map(len, targets)
            )
    for kind in KINDS:
        moments = observed_at(study, store, kind, 0).moments
        assert (
            relative(moments.keys.float(), expected[kind, 0]) < 1e-3
            and relative(moments.values.float(), expected[kind, 1]) < 1e-3
        )


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_what_the_refit_calls_is_what_calibration_saw(family, observed):
    """The original's attention, called as the refit calls the converted one, gives the heads that
    were noted.
    """
    study, model, _, _, store = observed(family)
    for kind, adapter in study.family.kinds.items():
        attention, noted = model.get_submodule(adapter.module(1).rstrip(".")), []
        hook = attention.get_submodule(adapter.output).register_forward_pre_hook(
            lambda module, args: noted.append(args[0])
        )
        for x, arguments, heads in observed_at(study, store, kind, 1).calls(torch.device("cpu")):
            with torch.no_grad():
                attention(x, **arguments)
            assert relative(noted.pop(), heads) < 0.05  # both went through bfloat16
        hook.remove()


@pytest.mark.parametrize(
    "step",
    [
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("calibrating", "gradients")),
        "converting",
    ],
)
def test_the_same_command_goes_on_after_an_interruption(step, tiny, data, tmp_path):
    """Stopped before its second layer, wherever that is, it ends with the same bytes; finished
    layers are not done again.
    """
    options = dict(calibration=[data("bart")], cache_ratio=0.6)
    whole = convert(str(tiny("bart")), tmp_path / "whole", **options).out
    work, seen = tmp_path / "out.partial" / "work", []
    kept = lambda: {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in work.glob("*.pt")}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == step and done == 1:
            seen.append(kept())
            raise KeyboardInterrupt

    def look(stage: str, done: int, total: int) -> None:
        if stage == "converting":
            seen.append(kept())

    with pytest.raises(KeyboardInterrupt, match="same command"):
        convert(str(tiny("bart")), tmp_path / "out", progress=stop, **options)
    convert(str(tiny("bart")), tmp_path / "out", progress=look, **options)
    before, *after = seen
    assert len(after) == 2  # layers
    # what each stage leaves of a layer, and what was left of those that were done
    left = {"calibrating": "forward", "gradients": "moments-1", "converting": "fitted-0"}[step]
    assert f"{left}.pt" in before
    if step == "converting":
        assert after[0]["fitted-0.pt"] == after[1]["fitted-0.pt"] == before["fitted-0.pt"]
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "family", ["bart", "marian", "t5", pytest.param("whisper", marks=pytest.mark.slow)]
)
class TestCalibrated:
    def test_calibrated_and_planned(self, family, tiny, converted, data):
        """A plan within each budget, recorded for each kind, that is nearer to the original than
        one from the weights alone in as many bytes.
        """
        folder = converted(family, calibrated=True, cache_ratio=0.6)
        record = json.loads((folder / "lrkv.json").read_text())
        assert (
            set(record["attention"]) == set(KINDS)
            and record["recipe"]["metric"] == "fisher"
            and record["calibration"]["tokens"] > 50
        )
        for kind in KINDS:
            fitted = record["attention"][kind]
            assert fitted["cache"]["kv_ratio"] <= 0.6 and len(fitted["layers"]) == 2
        plain = converted(family, metric="plain", rank_k=7, rank_v=7)
        result = compare(
            [str(tiny(family)), str(folder), str(plain)],
            corpora(data(family)),
            device=torch.device("cpu"),
        )
        base, ours, other = result["models"]
        assert (
            base["ratio"] == 1
            and base["same_words"] == (1 if base["words"] else None)
            and base["kl"] == 0
        )
        assert 0 < ours["kl"] < other["kl"]
        assert (
            ours["self_bytes"] == ours["self_bytes_allocated"]
            and ours["cross_bytes"] == ours["cross_bytes_allocated"] <= 0.6 * base["cross_bytes"]
        )

    def test_refit_brings_the_output_nearer(self, family, tiny, data, tmp_path):
        folders = [
            str(
                convert(
                    str(tiny(family)),
                    tmp_path / str(refit),
                    rank=4,
                    calibration=[data(family)],
                    refit=refit,
                ).out
            )
            for refit in (True, False)
        ]
        refitted, plain = compare(
            [str(tiny(family)), *folders], corpora(data(family)), device=torch.device("cpu")
        )["models"][1:]
        assert refitted["kl"] < plain["kl"]
