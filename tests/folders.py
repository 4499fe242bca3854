"""Folders as people leave them: a tiny model written in many layouts, with what other programs
put beside and into it; and one judge for all of them."""

import json
import shutil
from pathlib import Path

import torch
from conftest import prompt, relative
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lrkv_cli.main import app

CLOSE = 1e-4  # relative: full rank, in float32
EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
}
BASE = {"llama": "model.", "qwen2": "model.", "gpt2": "transformer."}
LAYER = {
    "llama": "model.layers.0.self_attn.",
    "qwen2": "model.layers.0.self_attn.",
    "gpt2": "transformer.h.0.attn.",
}


def save_safe(tensors: dict, file: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def save_legacy(tensors: dict, file: Path) -> None:
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


def older(tensors: dict) -> dict:
    """The weights of an earlier save: near, but not these."""
    return {
        name: (t.float() * 1.1).to(t.dtype) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def shards(folder: Path, tensors: dict, count: int, stem: str, ending: str, save) -> dict[str, str]:
    """Write `count` files; returns the weight_map of their index."""
    names, placed = sorted(tensors), {}
    for i in range(count):
        part, file = (
            names[i * len(names) // count : (i + 1) * len(names) // count],
            f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}",
        )
        save({name: tensors[name] for name in part}, folder / file)
        placed |= dict.fromkeys(part, file)
    return placed


def index(folder: Path, file: str, placed) -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write(folder: Path, tensors: dict, layout: str) -> None:
    """The weights in one of the layouts that transformers reads."""
    if layout == "safetensors":
        save_safe(tensors, folder / "model.safetensors")
    elif layout == "sharded":
        index(
            folder,
            "model.safetensors.index.json",
            shards(folder, tensors, 2, "model", "safetensors", save_safe),
        )
    elif layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif layout == "legacy":
        save_legacy(tensors, folder / "pytorch_model.bin")
    else:
        index(
            folder,
            "pytorch_model.bin.index.json",
            shards(folder, tensors, 2, "pytorch_model", "bin", torch.save),
        )


LEFTOVERS = {  # what an earlier save left beside; files that the layout has are not written over
    "none": lambda folder, old: None,
    "fsdp": lambda folder, old: torch.save(old, folder / "pytorch_model_fsdp.bin"),
    "shards of three": lambda folder, old: (
        shards(folder, old, 3, "pytorch_model", "bin", torch.save),
        shards(folder, old, 3, "model", "safetensors", save_safe),
    ),
    "a stale bin": lambda folder, old: (
        (folder / "pytorch_model.bin").exists() or torch.save(old, folder / "pytorch_model.bin")
    ),
    "a stale bin index": lambda folder, old: (
        (folder / "pytorch_model.bin.index.json").exists()
        or index(
            folder,
            "pytorch_model.bin.index.json",
            shards(folder, old, 4, "pytorch_model", "bin", torch.save),
        )
    ),
    "a stale index": lambda folder, old: (
        (folder / "model.safetensors.index.json").exists()
        or not (folder / "model.safetensors").exists()
        or index(
            folder,
            "model.safetensors.index.json",
            shards(folder, old, 4, "model", "safetensors", save_safe),
        )
    ),
    "a variant": lambda folder, old: save_safe(old, folder / "model.fp16.safetensors"),
    "an adapter's weights": lambda folder, old: save_safe(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors"
    ),
}
PREFIXES = {
    "none": lambda tensors, base: tensors,
    "bare": lambda tensors, base: {name.removeprefix(base): t for name, t in tensors.items()},
    **{
        prefix: lambda tensors, base, prefix=prefix: {
            prefix + name: t for name, t in tensors.items()
        }
        for prefix in ("module.", "_orig_mod.", "base_model.model.")
    },
    "twice": lambda tensors, base: (
        tensors
        | {name.removeprefix(base): t + 1 for name, t in tensors.items() if name.startswith(base)}
    ),
}
EXTRAS = {
    "none": lambda at, base: {},
    "a head": lambda at, base: {"v_head.summary.weight": torch.ones(1, 4)},
    "tables": lambda at, base: {
        at + "rotary_emb.inv_freq": torch.ones(4),
        at + "masked_bias": torch.tensor(-1e4),
        at + "bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    },
    "a layer more": lambda at, base: {at.replace(".0.", ".7.") + "o_proj.weight": torch.ones(2, 2)},
    "a bias": lambda at, base: {at + "o_proj.bias": torch.ones(3)},
    "an adapter": lambda at, base: {at + "o_proj.lora_A.weight": torch.ones(2, 3)},
    "a norm": lambda at, base: {at + "q_norm.weight": torch.ones(20)},
    "positions": lambda at, base: {base + "position_ids": torch.arange(8)},
}
CHANGES = {
    "as they are": lambda name, t: t,
    "bfloat16": lambda name, t: t.bfloat16(),
    "float64": lambda name, t: t.double(),
    "mixed": lambda name, t: t.half() if "mlp" in name else t,
    "one int8": lambda name, t: (t * 9).to(torch.int8) if "0" in name and "mlp" in name else t,
    "one float8": lambda name, t: t.to(torch.float8_e4m3fn) if "1" in name and "mlp" in name else t,
    "one bool": lambda name, t: t > 0 if "0" in name and "attn" in name and t.ndim > 1 else t,
}


def ties(kind: str, family: str, tensors: dict, config: dict) -> None:
    """Change which of embedding and head are there, and what the config says of them."""
    embedding, head = EMBEDDING[family], "lm_head.weight"
    tensors.setdefault(head, tensors[embedding].clone())
    config["tie_word_embeddings"] = not kind.startswith("untied")
    if kind == "tied, both":
        tensors[head] = tensors[embedding].clone()
    elif kind == "tied, differing":
        tensors[head] = tensors[embedding] * 0.9
    elif kind in ("tied, no head", "untied, no head"):
        del tensors[head]
    elif kind == "tied, no embedding":
        del tensors[embedding]


TIES = (
    "as they are",
    "tied, both",
    "tied, differing",
    "tied, no head",
    "tied, no embedding",
    "untied, both",
    "untied, no head",
)


def make(
    source: Path,
    folder: Path,
    family: str,
    *,
    layout: str = "safetensors",
    leftover: str = "none",
    prefix: str = "none",
    tie: str = "as they are",
    extra: str = "none",
    change: str = "as they are",
) -> Path:
    """A copy of the tiny model of this family, left like that."""
    shutil.copytree(source, folder)
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    (folder / "model.safetensors").unlink()
    if tie != "as they are":
        ties(tie, family, tensors, config)
    tensors = {name: CHANGES[change](name, t) for name, t in tensors.items()}
    tensors = PREFIXES[prefix](tensors | EXTRAS[extra](LAYER[family], BASE[family]), BASE[family])
    write(folder, tensors, layout)
    LEFTOVERS[leftover](folder, older(tensors))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert_fully(folder: Path, out: Path, *options: str, rank: int = 20):
    """`lrkv convert` at full rank; a refusal is one line and leaves nothing behind."""
    result = CliRunner().invoke(
        app,
        [
            "convert",
            str(folder),
            "--out",
            str(out),
            "--rank",
            str(rank),
            "--force",
            "--calibration",
            "none",
            "--metric",  # named: that of the gradient needs text, and a notice would say so
            "plain",
            "--dtype",
            "float32",
            *options,
        ],
    )
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        lines = result.stderr.strip().splitlines()
        assert (
            len(lines) == 1
            and lines[0].startswith("error: ")
            and "; " in lines[0]
            and len(lines[0]) < 1000
        ), result.stderr
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return result


def judged(folder: Path, out: Path) -> str:
    """Convert at full rank: "refused", or "same" with the logits of from_pretrained; anything
    else is an AssertionError."""
    result = convert_fully(folder, out)
    if result.exit_code:
        return "refused"
    original, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], (
        "weights made up by transformers were taken for something: "
        f"{sorted(info['missing_keys'])[:3]}"
    )
    with torch.no_grad():
        theirs, ours = (
            original(prompt(30)).logits,
            AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(prompt(30)).logits,
        )
    assert relative(ours, theirs) < CLOSE, f"other logits: {relative(ours, theirs):.1e}"
    return "same"
