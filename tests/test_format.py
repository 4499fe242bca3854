"""What a converted folder says of itself: read without torch, true of its weights and its cache,
and refused in one line where it is newer or broken.
"""

import ast
import copy
import importlib.util
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lrkv_convert
from lrkv_convert import LrkvError, load, read_folder
from lrkv_convert.format import FIELDS, FORMAT, Cached, Record, page

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FOLDERS = ("llama", "qwen3", "whisper")


def weights(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def content(name: str, file: str = "lrkv.json") -> dict:
    return json.loads((GOLDEN / name / file).read_text())


def python(code: str, **more) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **more
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------- read and written


@pytest.mark.parametrize("name", FOLDERS)
def test_a_record_of_format_1_is_read_as_one_of_today(name):
    old, record = content(name), read_folder(GOLDEN / name).record
    assert old["format"] == 1 and record.format == FORMAT
    fitted = old.get("attention") or {"self": old}
    for kind, said in fitted.items():
        new = record.attention[kind].to_json()
        assert {field: new[field] for field in ("cache", "keys", "geometry", "layers")} == {
            field: said[field] for field in ("cache", "keys", "geometry", "layers")
        }
    again = record.to_json()
    moved = ("format", "cache", "keys", "geometry", "layers", "attention", "calibration")
    assert all(again[field] == value for field, value in old.items() if field not in moved)
    assert Record.from_json(json.loads(json.dumps(again))) == record


def test_what_is_not_known_is_kept():
    told = content("llama") | {"mood": "good"}
    told["source"]["colour"] = {"of": ["wool"]}
    written = Record.from_json(told).to_json()
    assert written["mood"] == "good" and written["source"]["colour"] == {"of": ["wool"]}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r.update(format=FORMAT + 1), f"of format {FORMAT + 1}"),
        (lambda r: r.update(format="2"), "format is '2'"),
        (lambda r: r.update(format=True), "format is True"),
        (lambda r: r.pop("source"), "source is not there"),
        (lambda r: r["source"].update(sha256=7), "source.sha256 holds a whole number where a text"),
        (lambda r: r.update(layers={}), "attention.self.layers holds an object where a list"),
        (lambda r: r["layers"][1]["keys"].update(rank=2.5), "layers[1].keys.rank holds a number"),
        (lambda r: r["layers"][1]["keys"].update(rank=True), "rank holds true or false"),
        (lambda r: r["layers"][0]["values"].pop("error"), "layers[0].values.error is not there"),
        (lambda r: r.pop("cache"), "attention"),
        (lambda r: r.update(attention={}), "of the kinds none"),
        (lambda r: r.update(attention={"own": 1}), "of the kinds own"),
        (lambda r: r.update(history=[{}]), "history[0].date is not there"),
    ],
)
def test_a_newer_or_broken_record_is_refused_in_one_line(change, says, tmp_path):
    told = content("llama")
    change(told)
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    (folder / "lrkv.json").write_text(json.dumps(told))
    with pytest.raises(LrkvError) as refusal:
        read_folder(folder)
    assert says in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c["lrkv"].update(format=FORMAT + 1), f"of format {FORMAT + 1}"),
        (lambda c: c["lrkv"]["keys"].update(form="round"), "keys.form is 'round'"),
        (lambda c: c["lrkv"]["keys"]["rank"].pop(), "not of one length"),
        (lambda c: c["lrkv"].update(values=None), "values holds null"),
        (lambda c: c.pop("lrkv"), "does not say how self-attention is cached"),
        (lambda c: c.update(lrkv=[]), "holds a list"),
    ],
)
def test_a_newer_or_broken_config_is_refused_in_one_line(change, says, tmp_path):
    told = content("llama", "config.json")
    change(told)
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(LrkvError) as refusal:
        read_folder(folder)
    assert says in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_what_is_no_converted_folder_is_refused(tiny, tmp_path):
    for folder, says in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path, "it has no config.json"),
        (tiny(), "it has no lrkv.json"),
    ):
        with pytest.raises(LrkvError, match=says):
            read_folder(folder)


# ------------------------------------------------------------------------------- true of the folder


@pytest.mark.parametrize("name", FOLDERS)
def test_names_and_shapes_are_those_of_golden_weights(name):
    folder, found = read_folder(GOLDEN / name), weights(GOLDEN / name)
    for kind, cached in folder.attention.items():
        for layer in range(len(cached.keys.rank)):
            where = {"self": "self_attn", "cross": "encoder_attn"}[kind]
            path = f"layers.{layer}.{where}."
            there = {
                name.partition(path)[2]: shape
                for name, shape in found.items()
                if path in name
                and name.partition(path)[2].startswith(("keys.", "values."))
                and "encoder.layers" not in name.replace("model.decoder", "")
                and not name.endswith("bias")
            }
            assert folder.tensors(kind, layer) == there


OPTIONS = [
    {},
    {"base": "aligned"},
    {"keys": "per-head"},
    {"keys": "rotary"},
    {"keys": "full"},
    {"rank": 0, "base_width": 30},
]


# GPT-J turns a part of each head, which aligned bases and rotated ones do not go with
ELSEWHERE = [OPTIONS[0], OPTIONS[2], OPTIONS[4]]


@pytest.mark.parametrize(
    "family, options",
    [*(("llama", options) for options in OPTIONS), *(("gptj", options) for options in ELSEWHERE)],
    ids=str,
)
def test_names_and_shapes_are_those_of_new_weights(family, options, converted):
    out = converted(family, calibration=[], **options)
    folder, found = read_folder(out), weights(out)
    for layer in folder.record.attention["self"].layers:
        said = {
            f"{layer.path}.{name}": shape
            for name, shape in folder.tensors("self", layer.layer).items()
        }
        assert said and said.items() <= found.items()
        sides = tuple(f"{layer.path}.{side}." for side in ("keys", "values"))
        others = {name for name in found if name.startswith(sides)} - said.keys()
        assert all(name.endswith(".bias") for name in others)


def cached_keys(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, residual) of the first layer for one token said eight times: what was rotated differs
    from position to position.
    """
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        cache = model(torch.full((1, 8), 7)).past_key_values
    # where one of the two is empty, the other has the first place
    layers = [cache.layers[i] for i in (0, model.config.num_hidden_layers)]
    found = [layer.keys.double() for layer in layers if getattr(layer, "keys", None) is not None]
    return found[0], found[-1]


@pytest.mark.parametrize("form", ["joint", "rotary", "commuting", "full"])
def test_keys_lie_in_the_cache_rotated_as_the_config_says(form, converted):
    out = converted("llama", calibration=[], keys=form)
    said = read_folder(out).attention["self"].keys
    parts = dict(zip(("base", "residual"), cached_keys(out)))
    assert said.form == form and {
        name
        for name, part in parts.items()
        if (part.shape[1] > 1) == (name == "residual")
        and not torch.allclose(part, part[:, :, :1].expand_as(part), atol=1e-5)
    } == set(said.rotated_in_cache)


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neox"])
def test_half_split_channels_turn_together_and_the_others_not_at_all(family, converted):
    out = converted(family, calibration=[], keys="full")
    said = read_folder(out).attention["self"]
    keys, n = cached_keys(out)[1], said.rotary_dim[0]  # (1, H, T, d)
    assert said.rope_layout == "half-split" and n > 0
    still = keys[:, :, :1].expand_as(keys)
    assert torch.allclose(keys[..., n:], still[..., n:], atol=1e-5)
    pairs = lambda x: (x[..., : n // 2] ** 2 + x[..., n // 2 : n] ** 2).sqrt()
    assert torch.allclose(pairs(keys), pairs(still), rtol=1e-4, atol=1e-5)
    # the fastest pair, and with it both its channels
    for channel in (0, n // 2):
        assert not torch.allclose(keys[..., channel], still[..., channel], atol=1e-4)


def test_without_rope_nothing_is_said_of_it(converted):
    said = read_folder(converted("gpt2", calibration=[])).attention["self"]
    assert said.rope_layout is None and set(said.rotary_dim) == {0}
    assert said.keys.rotated_in_cache == ()


def test_a_field_of_format_1_is_completed_from_the_record():
    said = read_folder(GOLDEN / "llama").attention["self"]
    assert "rotary_dim" not in content("llama", "config.json")["lrkv"]
    assert (said.rope_layout, said.rotary_dim) == ("half-split", (20, 20))
    assert read_folder(GOLDEN / "whisper").attention["cross"].rope_layout is None
    for kind, field in FIELDS.items():
        if kind in read_folder(GOLDEN / "whisper").attention:
            assert Cached.from_json(content("whisper", "config.json")[field]).format == FORMAT


def test_the_page_of_the_format_is_up_to_date():
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert page(text) == text and "| `rope_layout` |" in text and "| `kv_ratio` |" in text


# --------------------------------------------------------------------------------- a light package

HEAVY = "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers'}))"


@pytest.mark.slow
def test_the_package_and_its_reader_import_neither_torch_nor_transformers():
    code = f"""
import sys, lrkv_convert
{HEAVY}
lrkv_convert.read_folder({str(GOLDEN / "whisper")!r})
{HEAVY}
lrkv_convert.convert
{HEAVY}
"""
    assert python(code).splitlines() == ["[]", "[]", "['torch', 'transformers']"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import lrkv_convert, transformers",
        "import transformers, lrkv_convert",
        "from transformers import AutoConfig; import lrkv_convert",
        "import lrkv_convert; import transformers.models.auto.configuration_auto as auto",
        "import lrkv_convert; from transformers import LlamaForCausalLM, Trainer, pipeline",
    ],
)
def test_transformers_loads_converted_folders_whichever_is_imported_first(first, tmp_path):
    """Without trust_remote_code, by the package's own classes."""
    code = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq
print(AutoConfig.for_model("lrkv_gpt2").model_type)
print(type(AutoModelForCausalLM.from_pretrained({str(GOLDEN / "llama")!r})).__module__)
print(type(AutoModelForSpeechSeq2Seq.from_pretrained({str(GOLDEN / "whisper")!r})).__module__)
"""
    assert python(code, stdin=subprocess.DEVNULL).splitlines() == [
        "lrkv_gpt2",
        "lrkv_convert.modeling.modeling_lrkv_llama",
        "lrkv_convert.modeling.modeling_lrkv_whisper",
    ]


def test_load_gives_the_model_of_a_folder():
    for name, kind in (("qwen3", "LrkvQwen3ForCausalLM"), ("whisper", "LrkvWhisperFor")):
        model = load(GOLDEN / name, dtype="float32")
        assert type(model).__name__.startswith(kind) and model.dtype == torch.float32
        assert not model.training


def test_load_refuses_what_is_not_converted(tiny, tmp_path):
    for folder, says in ((tiny(), "is no converted model"), (tmp_path / "no", "no such model")):
        with pytest.raises(LrkvError, match=says):
            load(folder)


def test_editors_see_the_names_that_the_package_gives():
    """The imports for type checkers are those of __getattr__, each module has its name, and no
    module is called like one.
    """
    tree = ast.parse((ROOT / "lrkv_convert" / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == lrkv_convert.PLACES
    assert set(lrkv_convert.__all__) == {*seen, "LrkvError"} <= set(dir(lrkv_convert))
    for name, module in seen.items():
        file = ROOT / "lrkv_convert" / f"{module.replace('.', '/')}.py"
        found = ast.parse(file.read_text(encoding="utf-8")).body
        assert name in {getattr(node, "name", None) for node in found}
    modules = {module.name for module in pkgutil.iter_modules(lrkv_convert.__path__)}
    assert not modules & set(lrkv_convert.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sheep'"):
        lrkv_convert.sheep  # noqa: B018


def test_it_is_typed():
    assert importlib.util.find_spec("lrkv_convert").submodule_search_locations
    assert (Path(lrkv_convert.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_everything_is_imported_where_there_is_no_resource_and_no_fcntl():
    """As on Windows, whose own libraries do without, too."""
    code = """
import builtins, importlib, pkgutil
here = builtins.__import__
def there(name, given=None, *more, **named):
    if name in ("resource", "fcntl", "pwd", "grp", "termios", "pty"):
        if (given or {}).get("__name__", "").startswith("lrkv"):
            raise ImportError(name)
    return here(name, given, *more, **named)
builtins.__import__ = there
import lrkv_convert, lrkv_cli
count = 0
for package in (lrkv_convert, lrkv_cli):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        count += 1
print(count)
"""
    assert int(python(code)) > 100


def test_a_copied_record_is_not_shared():
    """What is read does not change with what it was read from."""
    told = content("llama")
    record, before = Record.from_json(told), copy.deepcopy(told)
    told["layers"].clear()
    assert [layer.layer for layer in record.attention["self"].layers] == [0, 1]
    assert before["layers"]
