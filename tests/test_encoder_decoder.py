"""Encoder-decoders: what must hold for every family, in decoder self- and cross-attention; tiny models of odd sizes whose stacks differ in depth and heads."""
import json
import os
import shutil
import signal
import subprocess
import sys
import wave
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import relative, run, tiny_tokenizer
from safetensors.torch import load_file
from transformers import BartConfig, MarianConfig, StaticCache, T5Config, WhisperConfig, WhisperFeatureExtractor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lrkv_convert import LrkvError, convert
from lrkv_convert.adapters import ENCODER_DECODERS, KINDS
from lrkv_convert.checkpoint import open_checkpoint
from lrkv_convert.evaluate.load import load_model
from lrkv_convert.evaluate.memory import cache_bytes, formula_bytes_by_kind
from lrkv_convert.modeling import auto_class
from lrkv_convert.seq2seq import writing
from lrkv_convert.seq2seq.compare import compare
from lrkv_convert.seq2seq.conversion import gather, read
from lrkv_convert.options import Options
from lrkv_convert.seq2seq.calibrate import CrossSums, calibrate, calibrated_layer, head_moments
from lrkv_convert.seq2seq.skeleton import StackSkeleton
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
        from safetensors.torch import save_file
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
        assert base["ratio"] == 1 and base["same_words"] == 1 and base["kl"] == 0
        assert 0 < ours["kl"] < other["kl"]
        assert ours["self_bytes"] == ours["self_bytes_allocated"] and ours["cross_bytes"] == ours["cross_bytes_allocated"] <= 0.6 * base["cross_bytes"]

    def test_refit_brings_the_output_nearer(self, family, tiny, data, tmp_path):
        option = {"audio" if family == "whisper" else "pairs": [data(family)]}
        folders = [str(convert(str(tiny(family)), tmp_path / str(refit), rank=4, calibration=[data(family)], refit=refit).out) for refit in (True, False)]
        refitted, plain = compare([str(tiny(family)), *folders], **option, device=torch.device("cpu"))["models"][1:]
        assert refitted["kl"] < plain["kl"]


@torch.no_grad()
def logits_of(model, given, ids):
    return model(**given, decoder_input_ids=ids, use_cache=False).logits
