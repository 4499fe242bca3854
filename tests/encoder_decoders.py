"""Tiny encoder-decoders of odd sizes, whose stacks differ in depth and heads, what they are
calibrated on, and how they are run. A new family is a new row.
"""

import json
import wave
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    MarianConfig,
    PegasusConfig,
    T5Config,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from lrkv_convert import convert
from lrkv_convert.evaluate.load import load_model
from lrkv_convert.examples import writing
from lrkv_convert.examples.pairs import Corpus, read_pairs
from lrkv_convert.examples.speech import read_speech
from lrkv_convert.modeling import auto_class

FLOAT32, FLOAT64, STEPS = 1e-4, 1e-9, 1e-4
SPECIAL = dict(
    vocab_size=260, bos_token_id=256, eos_token_id=257, pad_token_id=258, decoder_start_token_id=256
)
BART = dict(
    SPECIAL,
    d_model=60,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=3,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    init_std=0.3,
    dropout=0.0,
    max_position_embeddings=80,
    forced_eos_token_id=None,
)
T5 = dict(
    SPECIAL,
    d_model=48,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=3,
    d_kv=20,
    d_ff=32,
    dropout_rate=0.0,
    initializer_factor=2.0,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
SPEECH = dict(
    max_source_positions=50, max_target_positions=80, num_mel_bins=8, begin_suppress_tokens=None
)
CONFIGS = {
    "bart": lambda: BartConfig(**BART, scale_embedding=True),
    "marian": lambda: MarianConfig(**BART),
    "marian-apart": lambda: MarianConfig(
        **BART,
        share_encoder_decoder_embeddings=False,
        decoder_vocab_size=260,
        tie_word_embeddings=False,
    ),
    "pegasus": lambda: PegasusConfig(**BART),
    "t5": lambda: T5Config(**T5),
    "t5-gated": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "whisper": lambda: WhisperConfig(**BART, **SPEECH),
}
PAIRS = [
    {
        "source": f"{i} sheep jumped over {i * 7 % 13} fences.",
        "target": f"Sheep number {i * i % 97} slept.",
    }
    for i in range(12)
]


def build(family: str, folder: Path, dtype=torch.float32) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = auto_class(config.model_type).from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    # T5 1.1 has an output layer of its own, whatever its config says of tying
    if family == "t5-gated":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(260, 48, dtype=dtype) / 7)
    model.save_pretrained(folder)
    if family == "t5-gated":
        state = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if name not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        }
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
            sound.writeframes(
                (torch.sin(2 * torch.pi * (200 + 100 * i) * t * (1 + t)) * 20000)
                .to(torch.int16)
                .numpy()
                .tobytes()
            )
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
    return lru_cache(None)(
        lambda family: build(family, tmp_path_factory.mktemp(family.replace("-", "_")) / "model")
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data(family) -> what it is calibrated on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    speech(folder / "speech")
    return lambda family: str(folder / ("speech" if family == "whisper" else "pairs.jsonl"))


def corpora(path: str) -> list[Corpus]:
    """What `compare` reads of a path that `data` gives."""
    return [(read_speech if Path(path).is_dir() else read_pairs)(path)]


@pytest.fixture(scope="module")
def converted(tiny, data, tmp_path_factory):
    """converted(family, **options) -> folder; each combination is converted once, to 16-bit numbers
    of ranks 7 unless told otherwise.
    """
    made = {}

    def get(family: str, calibrated: bool = False, **options) -> Path:
        key = (family, calibrated, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("lrkv") / "model"
            sizes = {"bits": "16"} if "cache_ratio" in options else {"rank": 7}
            convert(
                str(tiny(family)),
                made[key],
                calibration=[data(family)] if calibrated else [],
                **{**sizes, **options},
            )
        return made[key]

    return get


def load(folder, dtype="auto", **kwargs):
    model_type = json.loads((Path(folder) / "config.json").read_text())["model_type"].removeprefix(
        "lrkv_"
    )
    return load_model(str(folder), torch.device("cpu"), dtype, auto_class(model_type), **kwargs)


def source(model, batch: int = 1, length: int = 11) -> dict:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        return {
            "input_features": (
                torch.randn(batch, 8, 100, generator=generator, dtype=torch.float64).to(model.dtype)
            )
        }
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
    encoded, out = (
        model.get_encoder()(
            **given, **({} if mask is None else {"attention_mask": mask})
        ).last_hidden_state,
        [],
    )
    for start, stop in [(0, first)] + [(t, t + 1) for t in range(first, ids.shape[1])]:
        more = {} if decoder_mask is None else {"decoder_attention_mask": decoder_mask[:, :stop]}
        output = model(
            encoder_outputs=(encoded,),
            attention_mask=mask,
            decoder_input_ids=ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        cache = output.past_key_values
        out.append(output.logits)
    return torch.cat(out, dim=1), cache
