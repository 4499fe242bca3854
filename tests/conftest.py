"""Tiny models of every family, built from configs, with odd sizes: 3 KV heads of width 20."""

import itertools
import json
import os
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

# as the command line has it, which is too late where tqdm is imported
os.environ.setdefault("TQDM_DISABLE", "1")
# before anything imports Triton: kernels run on the CPU, interpreted
os.environ.setdefault("TRITON_INTERPRET", "1")
# as many processes as cores: a thread each, and no common folder of modelling files
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_MODULES_CACHE"] = f"{tempfile.gettempdir()}/lrkv-modules-{os.getpid()}-{worker}"

import pytest
import torch
from families import CONFIGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lrkv_cli.main import app
from lrkv_convert import convert
from lrkv_convert.modeling import FAMILIES

# tiny models gain nothing from more; OMP_NUM_THREADS=1 is respected
torch.set_num_threads(min(2, torch.get_num_threads()))
# every layout of a cache; all families: test_families.py
THOROUGH = ("llama", "llama-bias", "llama-mha-yarn", "mistral", "qwen2", "gpt2")


# families that `make test` tries, one of every kind; the others are left to `make test-all`
QUICK = {"llama", "qwen2", "qwen3", "smollm3", "gpt2", "falcon", "t5", "whisper"}


def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(item, "callspec", None)
        family = given.params.get("family") if given else None
        if isinstance(family, str) and family not in QUICK:
            item.add_marker(pytest.mark.slow)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def build(family: str, folder: Path, dtype=torch.float32, **save) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family) -> folder of the original model; built once."""
    made = {}

    def get(family: str = "llama") -> Path:
        if family not in made:
            made[family] = build(
                family, tmp_path_factory.mktemp(family.replace("-", "_")) / "model"
            )
        return made[family]

    return get


@pytest.fixture
def source(tiny, tmp_path) -> Path:
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(tiny(), tmp_path / "source"))


@pytest.fixture(scope="session")
def converted(tiny, tmp_path_factory):
    """converted(family, **options) -> folder; each combination is converted once, to 16-bit numbers
    unless told otherwise: of rank 7, or of a budget.
    """
    made = {}

    def get(family: str = "llama", **options) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("lrkv") / "model"
            sizes = {"rank": 7} if options.get("rank", 7) is not None else {"bits": "16"}
            convert(str(tiny(family)), folder, **{**sizes, "calibration_tokens": 1024, **options})
            made[key] = folder  # whole: a conversion that failed is tried again
        return made[key]

    return get


@pytest.fixture(params=THOROUGH)
def family(request) -> str:
    return request.param


def prompt(length: int = 40, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


# layers without base or without residual, of keys or of values, beside one that has all: what a
# planned conversion holds
UNEVEN = {
    "keys": {"base_width": [0, 32, 32], "rank": [8, 0, 4], "alignment": True},
    "values": {"base_width": [16, 32, 16], "rank": [0, 0, 4], "alignment": True},
}


def uneven(family: str = "llama", lrkv: dict = UNEVEN):
    config = CONFIGS[family]().to_dict() | {"num_hidden_layers": 3}
    config_class, _, model_class = FAMILIES[config.pop("model_type")]
    config.pop("layer_types", None)
    torch.manual_seed(0)
    return model_class(config_class(**config, lrkv=lrkv)).eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def refused(source, out: Path, *options: str, says: str) -> str:
    """Run `lrkv convert`; it must fail with one line containing `says`, leaving no trace of
    `out`.
    """
    before = sorted(p.name for p in out.parent.iterdir()) if out.parent.is_dir() else None
    rank = [] if "--cache-ratio" in options and "--rank" not in options else ["--rank", "7"]
    result = CliRunner().invoke(
        app,
        [
            "convert",
            str(source),
            "--out",
            str(out),
            *rank,
            "--calibration-tokens",
            "1024",
            *options,
        ],
    )
    assert result.exit_code == 1, result.output + repr(result.exception)
    line = result.stderr.strip()
    assert len(line.splitlines()) == 1 and line.startswith("error: ") and "; " in line, line
    assert says in line, line
    if before is not None:
        assert sorted(p.name for p in out.parent.iterdir()) == before
    return line


# six steps of healing
SHORT = dict(
    tokens=6 * 4 * 64,
    seq_len=64,
    batch_size=4,
    validation_tokens=256,
    validate_every=3,
    checkpoint_every=2,
    precision="fp32",
    tracker="none",
)


@pytest.fixture(scope="session")
def sheep(tmp_path_factory):
    """A few kilobytes of something learnable."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(
        "".join(
            f"{i} sheep jumped over {i * 7 % 13} fences, and {i * i % 97} slept.\n"
            for i in range(400)
        )
    )
    return file


def ctrl_c_after(step: int):
    """A `report` for `heal` that presses Ctrl-C in its step of this number, the second or later."""

    def report(line: dict) -> None:
        if line["step"] == step - 1:  # the next one is taken to its end
            signal.raise_signal(signal.SIGINT)

    return report


def without_its_source(folder: Path, copy: Path) -> Path:
    """A copy of a converted folder whose original is no longer where the record says."""
    shutil.copytree(folder, copy)
    record = json.loads((copy / "lrkv.json").read_text())
    record["source"]["path"] = "/gone"
    (copy / "lrkv.json").write_text(json.dumps(record))
    return copy


@contextmanager
def in_training(act):
    """act(call, output) -> output, of every pass of a Llama that is healed: the call-th one."""
    calls = itertools.count(1)

    def hook(module, _, output):
        if type(module).__name__ == "LrkvLlamaForCausalLM" and torch.is_grad_enabled():
            return act(next(calls), output)
        return None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "heal.jsonl").read_text().splitlines()]


def losses(folder) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


SETTINGS = [f"{name}={value}" for name, value in SHORT.items()]  # the same, for --set


def run(*arguments, code=0):
    """Run `lrkv` in this process; it must end with that code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result
