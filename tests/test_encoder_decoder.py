"""Encoder-decoders: what must hold for every family, in decoder self- and cross-attention; tiny models of odd sizes whose stacks differ in depth and heads."""
import json
import shutil
import subprocess
import sys
import wave
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import refused, relative, run, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutomaticSpeechRecognitionPipeline, BartConfig, MarianConfig, PegasusConfig, T5Config, WhisperConfig, WhisperFeatureExtractor

from lrkv_convert import convert
from lrkv_convert.adapters import ENCODER_DECODERS, KINDS
from lrkv_convert.checkpoint import open_checkpoint
from lrkv_convert.evaluate.load import load_model
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes_by_kind
from lrkv_convert.modeling import ENCODER_DECODERS as ENCODER_DECODER_CLASSES
from lrkv_convert.modeling import attention_lrkv, auto_class
from lrkv_convert.modeling.attention_lrkv import choose_path
from lrkv_convert.seq2seq import conversion as story
from lrkv_convert.seq2seq import writing
from lrkv_convert.seq2seq.calibrate import calibrate, calibrated_layer, head_moments
from lrkv_convert.seq2seq.compare import compare
from lrkv_convert.seq2seq.skeleton import StackSkeleton
from lrkv_convert.sensitivity import SEED, draw
from lrkv_convert.store import Store

FLOAT32, FLOAT64, STEPS = 1e-4, 1e-9, 1e-4
SPECIAL = dict(vocab_size=260, bos_token_id=256, eos_token_id=257, pad_token_id=258, decoder_start_token_id=256)
BART = dict(SPECIAL, d_model=60, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32,
            init_std=0.3, dropout=0.0, max_position_embeddings=80, forced_eos_token_id=None)
T5 = dict(SPECIAL, d_model=48, num_layers=1, num_decoder_layers=2, num_heads=3, d_kv=20, d_ff=32, dropout_rate=0.0, initializer_factor=2.0, relative_attention_num_buckets=8,
          relative_attention_max_distance=12)
SPEECH = dict(max_source_positions=50, max_target_positions=80, num_mel_bins=8, begin_suppress_tokens=None)
CONFIGS = {
    "bart": lambda: BartConfig(**BART, scale_embedding=True),
    "marian": lambda: MarianConfig(**BART),
    "marian-apart": lambda: MarianConfig(**BART, share_encoder_decoder_embeddings=False, decoder_vocab_size=260, tie_word_embeddings=False),
    "pegasus": lambda: PegasusConfig(**BART),
    "t5": lambda: T5Config(**T5),
    "t5-gated": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "whisper": lambda: WhisperConfig(**BART, **SPEECH),
}
PAIRS = [{"source": f"{i} sheep jumped over {i * 7 % 13} fences.", "target": f"Sheep number {i * i % 97} slept."} for i in range(12)]


def build(family: str, folder: Path, dtype=torch.float32) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = auto_class(config.model_type).from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    if family == "t5-gated":        # T5 1.1 has an output layer of its own, whatever its config says of tying
        model.lm_head.weight = torch.nn.Parameter(torch.randn(260, 48, dtype=dtype) / 7)
    model.save_pretrained(folder)
    if family == "t5-gated":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    if family == "whisper":
        WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


def speech(folder: Path, count: int = 6, transcripts: bool = True) -> Path:
    """Tones that rise, and what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        t = torch.arange(8000 + 1000 * i) / 16000
        with wave.open(str(folder / f"{i}.wav"), "wb") as sound:
            sound.setparams((1, 2, 16000, 0, "NONE", ""))
            sound.writeframes((torch.sin(2 * torch.pi * (200 + 100 * i) * t * (1 + t)) * 20000).to(torch.int16).numpy().tobytes())
        if transcripts:
            (folder / f"{i}.txt").write_text(f"tone {i} of {count}\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def write_little():
    """Untrained models never come to an end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "TEXT", 6)
        patch.setattr(writing, "SPEECH", 6)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = lru_cache(None)(lambda family: build(family, tmp_path_factory.mktemp(family.replace("-", "_")) / "model"))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(family) -> what it is calibrated on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    speech(folder / "speech")
    return lambda family: str(folder / ("speech" if family == "whisper" else "pairs.jsonl"))


@pytest.fixture(scope="module")
def converted(tiny, data, tmp_path_factory):
    """converted(family, **options) -> folder; each combination is converted once, of ranks 7 unless told otherwise."""
    made = {}

    def get(family: str, calibrated: bool = False, **options) -> Path:
        key = (family, calibrated, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("lrkv") / "model"
            sizes = {} if "cache_ratio" in options else {"rank": 7}
            convert(str(tiny(family)), made[key], calibration=[data(family)] if calibrated else [], **{**sizes, **options})
        return made[key]

    return get


def load(folder, dtype="auto", **kwargs):
    model_type = json.loads((Path(folder) / "config.json").read_text())["model_type"].removeprefix("lrkv_")
    return load_model(str(folder), torch.device("cpu"), dtype, auto_class(model_type), **kwargs)


def source(model, batch: int = 1, length: int = 11) -> dict:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, 8, 100, generator=generator, dtype=torch.float64).to(model.dtype)}
    return {"input_ids": torch.randint(0, 256, (batch, length), generator=generator)}


def target(batch: int = 1, length: int = 9) -> torch.Tensor:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 256
    return ids


@torch.no_grad()
def logits(model, ids, **kwargs):
    given = source(model, len(ids))
    return model(**given, decoder_input_ids=ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def stepwise(model, ids, first: int, cache=None, given=None, mask=None, decoder_mask=None):
    given = given or source(model, len(ids))
    encoded, out = model.get_encoder()(**given, **({} if mask is None else {"attention_mask": mask})).last_hidden_state, []
    for start, stop in [(0, first)] + [(t, t + 1) for t in range(first, ids.shape[1])]:
        more = {} if decoder_mask is None else {"decoder_attention_mask": decoder_mask[:, :stop]}
        output = model(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **more)
        cache = output.past_key_values
        out.append(output.logits)
    return torch.cat(out, dim=1), cache


@pytest.mark.parametrize("family", CONFIGS)
class TestFamily:
    def test_heads_are_those_that_the_model_makes(self, family, tiny):
        """Queries, keys and values of every head, from the adapter's weights, equal what the model's own projections give; so does the output."""
        model, checkpoint = load(tiny(family)), open_checkpoint(str(tiny(family)))
        kinds = ENCODER_DECODERS[checkpoint.config.model_type].kinds
        for kind in KINDS:
            adapter, seen = kinds[kind], {}
            attention = model.get_submodule(adapter.module(1).rstrip("."))
            hooks = [attention.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
                     for name in (*adapter.projections, adapter.output)]
            logits(model, target())
            for hook in hooks:
                hook.remove()
            weights = adapter.split(checkpoint.tensor, 1, checkpoint.config)
            for name, W, b in zip(adapter.projections, (weights.W_Q[:, 0], weights.W_K, weights.W_V), (weights.b_Q, weights.b_K, weights.b_V)):
                x, made = seen[name]
                ours = torch.einsum("ntd,hde->nthe", x, W) + (0 if b is None else b.reshape(W.shape[0], -1))
                assert relative(ours.flatten(2), made) < 1e-5
            x, made = seen[adapter.output]
            bias = attention.get_submodule(adapter.output).bias
            assert relative(x @ weights.W_O.flatten(0, 2) + (0 if bias is None else bias), made) < 1e-5
            assert adapter.geometry(checkpoint.config).kv_heads == 3 and adapter.geometry(checkpoint.config).head_dim == 20

    def test_full_rank_is_exact(self, family, tiny, converted):
        ours, original = load(converted(family, rank=20, force=True)), load(tiny(family))
        assert relative(logits(ours, target()), logits(original, target())) < FLOAT32
        given, greedy = source(original, 2), dict(max_new_tokens=8, do_sample=False, num_beams=1)
        assert torch.equal(ours.generate(**given, **greedy), original.generate(**given, **greedy, use_cache=False))     # T5's cache has as many layers as its encoder

    def test_full_rank_is_exact_in_float64(self, family, tmp_path, monkeypatch):
        original = build(family, tmp_path / "source", dtype=torch.float64)
        convert(str(original), tmp_path / "out", rank=20, force=True, calibration=[])
        models = [load(folder) for folder in (tmp_path / "out", original)]
        monkeypatch.setattr(torch, "float32", torch.float64)        # norms and softmax are rounded to float32, which would hide the algebra
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
                assert relative(logits(model, ids), expected) < STEPS and relative(stepwise(model, ids, 5)[0], expected) < STEPS

    def test_padding_changes_nothing(self, family, converted):
        """Sources are padded on the right, what the decoder was given on the left."""
        model, ids, pad = load(converted(family)), target(2, 12), 4
        given = source(model, 2)
        mask = None
        if "input_ids" in given:
            mask = torch.ones_like(given["input_ids"])
            mask[1, -pad:] = 0
        short = {name: value if mask is None else value[:, :-pad] for name, value in source(model, 2).items()}
        out, _ = stepwise(model, ids, 5, given=given, mask=mask)
        alone = logits_of(model, {name: value[1:] for name, value in short.items()}, ids[1:])
        assert relative(out[1:], alone) < STEPS
        if family.startswith("t5"):             # in the others what lies before a token counts as its position, padding or not, as in the original
            padded, seen = torch.cat((torch.full((2, pad), 258), ids), dim=1), torch.cat((torch.zeros(2, pad), torch.ones(2, 12)), dim=1).long()
            assert relative(stepwise(model, padded, pad + 5, decoder_mask=seen, given=given, mask=mask)[0][:, pad:], out) < STEPS

    def test_it_generates_the_same_with_and_without_a_cache(self, family, converted):
        model = load(converted(family))
        given, plain = source(model, 2), dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for beams in (1, 3):
            assert torch.equal(model.generate(**given, **plain, num_beams=beams), model.generate(**given, **plain, num_beams=beams, use_cache=False))
        static = model.generate(**given, **plain, num_beams=1, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, model.generate(**given, **plain, num_beams=1))

    def test_allocated_bytes_equal_the_formula(self, family, converted):
        """Cross-attention's are written once, whatever the number of steps."""
        model, ids = load(converted(family, attention="self,cross")), target(2, 12)
        formula = formula_bytes_by_kind(model.config, 4)
        assert formula == {kind: 4 * 2 * 2 * (20 + 3 * 7) for kind in KINDS}
        _, cache = stepwise(model, ids, 3)
        positions = 50 if family == "whisper" else 11
        assert cache_bytes(cache.self_attention_cache) == 2 * 12 * formula["self"]
        assert cache_bytes(cache.cross_attention_cache) == 2 * positions * formula["cross"]
        one_kind = formula_bytes_by_kind(load(converted(family, attention="cross")).config, 4)
        assert one_kind == {"self": 4 * 2 * 2 * 60, "cross": formula["cross"]}

    def test_a_training_step_reaches_every_factor(self, family, converted):
        model, ids = load(converted(family)).train(), target(2, 12)
        loss = lambda: model(**source(model, 2), labels=ids).loss
        before = loss()
        before.backward()
        still = [name for name, p in model.named_parameters() if (".keys." in name or ".values." in name) and (p.grad is None or not p.grad.any())]
        assert not [name for name in still if not name.endswith("keys.bias")]       # a bias of keys without rotation changes no softmax
        torch.optim.SGD(model.parameters(), lr=1e-4).step()
        assert loss() < before


@torch.no_grad()
def logits_of(model, given, ids):
    return model(**given, decoder_input_ids=ids, use_cache=False).logits


# ------------------------------------------------------------------------------------------------ calibration

@pytest.fixture(scope="module")
def observed(tiny, tmp_path_factory):
    """observed(family) -> (skeleton, model, sources, targets, store) after calibration and gradients on three examples of different lengths."""
    def get(family: str):
        checkpoint = open_checkpoint(str(tiny(family)))
        skeleton = StackSkeleton(checkpoint, ENCODER_DECODERS[checkpoint.config.model_type], torch.device("cpu"))
        model = load(tiny(family), attn_implementation="eager")
        sources = [next(iter(source(model, 1, length).values())) for length in (7, 11, 5)]
        targets = [target(1, length)[0] for length in (6, 4, 9)]
        store = Store(tmp_path_factory.mktemp("store") / "work", {})
        calibrate(skeleton, KINDS, sources, targets, {"fisher", "attention", "whitened"}, store, [0, 1, 2])
        head_moments(skeleton, KINDS, [0, 1, 2], store)
        return skeleton, model, sources, targets, store
    return lru_cache(None)(get)


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "whisper"])
def test_sums_are_those_of_the_whole_model(family, observed):
    """Streamed layer by layer, and from what the whole model attends to, in both kinds of attention."""
    skeleton, model, sources, targets, store = observed(family)
    H, tokens = 3, sum(map(len, targets))
    expected = {kind: {"keys": 0, "values": 0, "queries": 0, "inputs": 0} for kind in KINDS}
    for x, ids in zip(sources, targets):
        seen = {}
        hooks = [model.get_submodule(adapter.module(1) + adapter.projections[0]).register_forward_hook(lambda m, args, out, kind=kind: seen.update({kind: (args[0][0], out[0])}))
                 for kind, adapter in skeleton.family.kinds.items()]
        with torch.no_grad():
            out = model(**{model.main_input_name: x}, decoder_input_ids=ids[None], output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        for kind, attention in (("self", out.decoder_attentions[1][0]), ("cross", out.cross_attentions[1][0])):        # (H, T, S)
            states = out.encoder_last_hidden_state[0] if kind == "cross" else seen[kind][0]
            sums = expected[kind]
            sums["keys"] = sums["keys"] + torch.einsum("hts,sd,se->de", attention, states, states)
            z = attention @ states                                                          # (H, T, D)
            sums["values"] = sums["values"] + torch.einsum("htd,hte->de", z, z)
            q = seen[kind][1].view(len(ids), H, -1)
            sums["queries"] = sums["queries"] + torch.einsum("thd,the->hde", q, q)
            sums["inputs"] = sums["inputs"] + states.T @ states * (len(ids) / len(states))
    for kind in KINDS:
        layer = calibrated_layer(skeleton, kind, store, 1)
        assert layer.sums["tokens"] == tokens
        for name, value in expected[kind].items():
            assert relative(layer.sums[name], value) < 1e-4, (kind, name)


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "whisper"])
def test_moments_are_those_of_the_whole_model(family, observed):
    """Gradients of the loss of tokens drawn from the model, layer by layer and through all of it at once."""
    skeleton, model, sources, targets, store = observed(family)
    generator, expected = torch.Generator().manual_seed(SEED), {}
    for x, ids in zip(sources, targets):
        seen, hooks = {}, []
        for kind, adapter in skeleton.family.kinds.items():
            attention = model.get_submodule(adapter.module(0).rstrip("."))
            hooks.append(attention.get_submodule(adapter.key_projection).register_forward_hook(lambda m, args, out, kind=kind: seen.update({(kind, 0): out})))
            hooks.append(attention.get_submodule(adapter.output).register_forward_pre_hook(lambda m, args, kind=kind: seen.update({(kind, 1): args[0]})))
        logits = model.requires_grad_(True)(**{model.main_input_name: x}, decoder_input_ids=ids[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        change = logits.detach().softmax(-1)
        change.scatter_add_(1, drawn := draw(change, generator), torch.full_like(drawn, -1, dtype=change.dtype))
        for name, g in zip(seen, torch.autograd.grad(logits, list(seen.values()), change)):
            g = g[0].view(-1, 3, 20)
            expected[name] = expected.get(name, 0) + torch.einsum("nhd,nhe->hde", g, g) / sum(map(len, targets))
    for kind in KINDS:
        moments = calibrated_layer(skeleton, kind, store, 0).moments
        assert relative(moments.keys.float(), expected[kind, 0]) < 1e-3 and relative(moments.values.float(), expected[kind, 1]) < 1e-3


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_what_the_refit_calls_is_what_calibration_saw(family, observed):
    """The original's attention, called as the refit calls the converted one, gives the heads that were noted."""
    skeleton, model, _, _, store = observed(family)
    for kind, adapter in skeleton.family.kinds.items():
        attention, noted = model.get_submodule(adapter.module(1).rstrip(".")), []
        hook = attention.get_submodule(adapter.output).register_forward_pre_hook(lambda module, args: noted.append(args[0]))
        for x, arguments, heads in calibrated_layer(skeleton, kind, store, 1).calls(torch.device("cpu")):
            with torch.no_grad():
                attention(x, **arguments)
            assert relative(noted.pop(), heads) < 0.05        # both went through bfloat16
        hook.remove()


@pytest.mark.parametrize("step", ["calibrate", "moments", "fit"])
def test_the_same_command_goes_on_after_an_interruption(step, tiny, data, tmp_path, monkeypatch):
    """Stopped in its second layer, wherever that is, it ends with the same bytes; finished layers are not done again."""
    options = dict(calibration=[data("bart")], cache_ratio=0.6)
    whole = convert(str(tiny("bart")), tmp_path / "whole", **options).out

    def stop_at(owner, name, call):
        original, calls = getattr(owner, name), []

        def stopping(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, stopping)
        return calls

    from lrkv_convert.seq2seq import calibrate as module
    place = {"calibrate": (StackSkeleton, "layer", 3), "moments": (module, "_backward", 2), "fit": (story, "convert_layer", 3)}[step]     # the encoder's layer comes first
    stop_at(*place)
    with pytest.raises(KeyboardInterrupt, match="same command"):
        convert(str(tiny("bart")), tmp_path / "out", **options)
    monkeypatch.undo()
    again = stop_at(story, "convert_layer", 0)
    convert(str(tiny("bart")), tmp_path / "out", **options)
    assert len(again) == (2 if step == "fit" else 4)        # two kinds in two layers
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("family", ["bart", "marian", "t5", "whisper"])
class TestCalibrated:
    def test_calibrated_and_planned(self, family, tiny, converted, data):
        """A plan within each budget, recorded for each kind, that is nearer to the original than one from the weights alone in as many bytes."""
        folder = converted(family, calibrated=True, cache_ratio=0.6)
        record = json.loads((folder / "lrkv.json").read_text())
        assert set(record["attention"]) == set(KINDS) and record["recipe"]["metric"] == "fisher" and record["calibration"]["tokens"] > 50
        for kind in KINDS:
            fitted = record["attention"][kind]
            assert fitted["cache"]["kv_ratio"] <= 0.6 and len(fitted["layers"]) == 2
        plain = converted(family, metric="plain", rank_k=7, rank_v=7)
        result = compare([str(tiny(family)), str(folder), str(plain)], **{"audio" if family == "whisper" else "pairs": [data(family)]}, device=torch.device("cpu"))
        base, ours, other = result["models"]
        assert base["ratio"] == 1 and base["same_words"] == (1 if base["words"] else None) and base["kl"] == 0
        assert 0 < ours["kl"] < other["kl"]
        assert ours["self_bytes"] == ours["self_bytes_allocated"] and ours["cross_bytes"] == ours["cross_bytes_allocated"] <= 0.6 * base["cross_bytes"]

    def test_refit_brings_the_output_nearer(self, family, tiny, data, tmp_path):
        option = {"audio" if family == "whisper" else "pairs": [data(family)]}
        folders = [str(convert(str(tiny(family)), tmp_path / str(refit), rank=4, calibration=[data(family)], refit=refit).out) for refit in (True, False)]
        refitted, plain = compare([str(tiny(family)), *folders], **option, device=torch.device("cpu"))["models"][1:]
        assert refitted["kl"] < plain["kl"]


# ------------------------------------------------------------------------------------------------ outputs and commands

LOAD = """
import json, sys
sys.modules["lrkv_convert"] = None
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
out = {}
for folder in sys.argv[1:]:
    speech = "whisper" in json.load(open(folder + "/config.json"))["model_type"]
    model = (AutoModelForSpeechSeq2Seq if speech else AutoModelForSeq2SeqLM).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(1, 8, 100, generator=generator, dtype=torch.float64).float() if speech else torch.randint(0, 256, (1, 11), generator=generator)
    with torch.no_grad():
        out[folder] = model(given, decoder_input_ids=torch.tensor([[256, 1, 2, 3]])).logits[0, -1].tolist()
print(json.dumps(out))
"""


def test_all_load_in_a_fresh_process_without_this_package(converted, tmp_path):
    """Also one that was loaded and saved once more."""
    folders = {str(converted(family)): family for family in ("bart", "marian", "pegasus", "t5", "whisper")}
    load(converted("whisper")).save_pretrained(tmp_path / "again")
    folders[str(tmp_path / "again")] = "whisper"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", LOAD, *folders], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, last in json.loads(result.stdout.strip().splitlines()[-1]).items():
        expected = logits(load(converted(folders[folder])), torch.tensor([[256, 1, 2, 3]]))[0, -1]
        assert relative(torch.tensor(last), expected) < FLOAT32, folder


UNEVEN = {"keys": {"base_width": [0, 16, 20], "rank": [7, 0, 7], "alignment": True}, "values": {"base_width": [40, 0, 0], "rank": [0, 9, 7], "alignment": True}}


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_layers_without_base_or_residual(family):
    """Of keys or of values, as planned conversions have them: what was written of cross-attention is read back as it was."""
    fields = {**CONFIGS[family]().to_dict(), "decoder_layers": 3, "num_decoder_layers": 3}
    config_class, _, model_class = ENCODER_DECODER_CLASSES[fields.pop("model_type")]
    torch.manual_seed(0)
    model, ids = model_class(config_class(**fields, lrkv=UNEVEN, lrkv_cross=UNEVEN)).eval(), target(2, 9)
    out, cache = stepwise(model, ids, 4)
    assert relative(out, logits(model, ids)) < STEPS
    assert cache_bytes(cache.cross_attention_cache) == 2 * (50 if family == "whisper" else 11) * formula_bytes_by_kind(model.config, 4)["cross"]
    plain = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    static = model.generate(**source(model, 2), **plain, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**source(model, 2), **plain, use_cache=False))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_kernel_reads_both_caches(family, converted):
    """In a step of one token; T5's self-attention, with a bias for each head, goes through the split path."""
    folder, ids = converted(family), target(1, 5)
    assert relative(stepwise(load(folder, lrkv_path="kernel"), ids, 4)[0], logits(load(folder), ids)) < STEPS


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_gpu_takes_the_path_the_table_says(family, converted, monkeypatch):
    model, taken = load(converted(family)), set()

    def on_a_gpu(asked, **situation):
        taken.add(choose_path(asked, **situation | {"device": torch.device("cuda"), "dtype": torch.bfloat16}))
        return "split"

    monkeypatch.setattr(attention_lrkv, "choose_path", on_a_gpu)
    monkeypatch.setattr(attention_lrkv, "missing_for_kernel", lambda *_: None)
    with torch.no_grad():
        stepwise(model, target(1, 3), 1)
    assert taken == {"kernel" if adapter.kernel else "split" for adapter in ENCODER_DECODERS[family].kinds.values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_behind_padding(dtype, converted):
    """T5 adds its position bias to a mask of the smallest numbers there are."""
    model, ids, pad = load(converted("t5"), dtype), target(2, 8), 3
    padded, seen = torch.cat((torch.full((2, pad), 258), ids), dim=1), torch.cat((torch.zeros(2, pad), torch.ones(2, 8)), dim=1).long()
    assert torch.isfinite(stepwise(model, padded, pad + 4, decoder_mask=seen)[0]).all()


def test_a_reloaded_model_says_nothing_is_missing(converted):
    for family in CONFIGS:
        model_type = family.split("-")[0]
        _, info = auto_class(model_type).from_pretrained(converted(family), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_commands(family, tiny, data, tmp_path):
    """convert shows both kinds, compare their caches and the words, --card writes them down."""
    out, option = tmp_path / "out", "--audio" if family == "whisper" else "--pairs"
    dry = run("convert", tiny(family), "--out", out, "--calibration", data(family), "--dry-run").output
    assert "decoder self-attention" in dry and "cross-attention" in dry and "numbers/encoder position" in dry and not out.exists()
    shown = run("convert", tiny(family), "--out", out, "--attention", "cross", "--calibration", data(family)).output
    assert "cross-attention" in shown and "decoder self-attention" not in shown and f"{option} F" in shown
    assert json.loads((out / "config.json").read_text())["lrkv"] is None
    result = tmp_path / "result.json"
    compared = run("compare", tiny(family), out, option, data(family), "--json", result, "--card").output
    assert "same words" in compared and "cross/position" in compared
    rows = json.loads(result.read_text())["models"]
    assert rows[1]["self_ratio"] == 1 and rows[1]["cross_ratio"] <= 0.5 and rows[0]["word_error_rate"] > 0
    card = (out / "README.md").read_text()
    assert "same words" in card and "--attention cross" in card and str(tmp_path) not in card
    assert ("automatic-speech-recognition" in card) == (family == "whisper")
    assert (out / "preprocessor_config.json").is_file() == (family == "whisper")


def test_without_targets_the_model_writes_them(tiny, tmp_path):
    """For calibration and for comparison, and the record says so; a text's paragraphs are sources, cut where the model can read no more."""
    (tmp_path / "text.txt").write_text("A first paragraph of five words.\n\nHeading\n\n" + "word " * 60)
    done = convert(str(tiny("bart")), tmp_path / "out", rank=7, calibration=[str(tmp_path / "text.txt")])
    assert done.record["calibration"]["targets_by_the_model"] == done.record["calibration"]["examples"] == 5        # one, and 300 tokens in windows of 78
    result = compare([str(tiny("bart")), str(done.out)], pairs=[str(tmp_path / "text.txt")], device=torch.device("cpu"))
    assert result["texts"][0]["targets_by_the_first_model"] == 5 and result["models"][0]["word_error_rate"] is None
    assert "written by the source model itself" in (done.out / "README.md").read_text()


def test_built_in_text_is_the_default_of_text_models(tiny, tmp_path):
    done = convert(str(tiny("t5")), tmp_path / "out", rank=7, calibration_tokens=600)
    assert done.record["calibration"]["texts"][0]["name"] == "built-in" and done.record["calibration"]["examples"] > 1


def test_old_names_are_read(tiny, tmp_path):
    """Checkpoints of the base model alone, and those that hold tied tensors under another of their names."""
    folder = Path(shutil.copytree(tiny("bart"), tmp_path / "source"))
    state = load_file(folder / "model.safetensors")
    assert "model.shared.weight" in state
    state["model.encoder.embed_tokens.weight"] = state.pop("model.shared.weight")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    assert relative(logits(load(tmp_path / "out"), target()), logits(load(tiny("bart")), target())) < FLOAT32


def test_positions_that_no_checkpoint_holds_are_made(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("pegasus"), tmp_path / "source"))
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if "embed_positions" not in name}, folder / "model.safetensors", metadata={"format": "pt"})
    convert(str(folder), tmp_path / "out", rank=20, force=True, calibration=[])
    assert relative(logits(load(tmp_path / "out"), target()), logits(load(tiny("pegasus")), target())) < FLOAT32


class TestRefusals:
    def test_kinds_of_attention(self, tiny, tmp_path):
        refused(tiny("bart"), tmp_path / "out", "--attention", "encoder", says="unknown attention 'encoder'")

    def test_decoders_have_no_cross_attention(self, tmp_path):
        from conftest import build as build_decoder
        source = build_decoder("gpt2", tmp_path / "source")
        refused(source, tmp_path / "out", "--attention", "self,cross", says="no cross-attention")

    def test_speech_needs_speech(self, tiny, data, tmp_path):
        refused(tiny("whisper"), tmp_path / "out", says="a speech model is calibrated on speech")
        refused(tiny("whisper"), tmp_path / "out", "--calibration", data("bart"), says="no folder of .wav files")
        refused(tiny("bart"), tmp_path / "out", "--calibration", "self", says="an encoder-decoder reads something before it writes")
        folder = Path(shutil.copytree(tiny("whisper"), tmp_path / "source"))
        (folder / "preprocessor_config.json").unlink()
        refused(folder, tmp_path / "out", "--calibration", data("whisper"), says="no feature extractor")

    def test_keys_that_turn(self, tiny, tmp_path):
        refused(tiny("t5"), tmp_path / "out", "--keys", "rotary", "--calibration", "none", says="needs RoPE")

    def test_too_long_a_source(self, tiny, tmp_path):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "x" * 100, "target": "y"}))
        assert "pairs.jsonl:1" in refused(tiny("bart"), tmp_path / "out", "--calibration", str(tmp_path / "pairs.jsonl"), says="more than the 80 the model reads")

    @pytest.mark.parametrize("command", [("inspect",), ("bench",), ("compare", "--text"), ("heal", "--data"), ("sweep", "--text")])
    def test_commands_for_decoders(self, command, tiny, converted, tmp_path):
        (tmp_path / "text.txt").write_text("some words " * 400)
        name, *option = command
        folder = converted("bart") if name == "heal" else tiny("bart")
        models = [folder, converted("bart")] if name in ("compare", "bench") else [folder]
        more = ["--out", tmp_path / "out"] if name in ("heal", "sweep", "inspect") else []
        error = run(name, *models, *((option[0], tmp_path / "text.txt") if option else ()), *more, code=1).stderr.strip()
        assert len(error.splitlines()) == 1 and "encoder-decoder" in error, error

    def test_comparing_with_the_wrong_thing(self, tiny, data, converted, tmp_path):
        for family, option, other in (("bart", "--audio", "whisper"), ("whisper", "--pairs", "bart")):
            error = run("compare", tiny(family), converted(family), option, data(other), code=1).stderr
            assert "reads text" in error or "reads speech" in error
        assert "does not go with" in run("compare", tiny("bart"), converted("bart"), "--pairs", data("bart"), "--prompt", "x", code=1).stderr
        assert "than the first model" in run("compare", tiny("bart"), converted("whisper"), "--pairs", data("bart"), code=1).stderr


def test_the_pipeline_of_transformers_takes_a_converted_whisper_for_what_transcribes(converted):
    model = load(converted("whisper"))
    tokenizer, features = tiny_tokenizer(), WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    transcribe = AutomaticSpeechRecognitionPipeline(model=model, tokenizer=tokenizer, feature_extractor=features)
    assert transcribe.type == "seq2seq"
    assert isinstance(transcribe({"raw": torch.zeros(16000).numpy(), "sampling_rate": 16000}, generate_kwargs={"max_new_tokens": 4})["text"], str)


@pytest.mark.parametrize("command, says", [
    (["compare", "{whisper}", "{whisper}", "--text", "{text}"], "an encoder-decoder, which reads speech; lrkv compare takes it with --audio FOLDER"), (["compare", "{t5}", "{t5}"], "--pairs FILE"),
    (["compare", "{t5}", "{t5}", "--pairs", "{pairs}", "--cache", "fp8"], "--cache does not go with"), (["serve", "{t5}"], "--pairs FILE"), (["eval", "{bart}"], "--pairs FILE"),
    (["convert", "{t5}", "--out", "{t5}-out", "--attention", "both"], "self,cross for both")])
def test_commands_say_what_such_a_model_reads(command, says, tiny, data):
    names = {"whisper": tiny("whisper"), "t5": tiny("t5"), "bart": tiny("bart"), "pairs": data("t5"), "text": __file__}
    result = run(*(part.format(**names) for part in command), code=1)
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_figures_on_what_a_model_was_calibrated_on_say_so(tiny, data, tmp_path):
    run("convert", tiny("bart"), "--out", tmp_path / "half", "--rank", 7, "--calibration", data("bart"))
    seen = run("compare", tiny("bart"), tmp_path / "half", "--pairs", data("bart"), "--card")
    assert "half was calibrated on pairs.jsonl" in seen.stdout and "**Calibrated on pairs.jsonl" in (tmp_path / "half" / "README.md").read_text()


def test_little_to_calibrate_on_is_said(tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    assert "fewer than the model is wide" in run("convert", tiny("bart"), "--out", tmp_path / "out", "--rank", 7, "--calibration", tmp_path / "pairs.jsonl").stdout
