"""What stands beside the weights: config, tokenizer, modelling files, the record lrkv.json, the model card."""
import importlib
import math
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .adapters import Adapter
from .calibrate import Text
from .checkpoint import Checkpoint
from .errors import LrkvError
from .modeling import FAMILIES, auto_map
from .plan import Plan
from .writer import RECORD, write_json

FORMAT = 1
NOT_CARRIED = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "quantization_config")


def converted_config(checkpoint: Checkpoint, adapter: Adapter, plan: Plan, dtype: torch.dtype, base: str):
    """The converted model's config: the source's, with its own model_type, the classes' places, and `lrkv`."""
    config_class, _, causal_class = FAMILIES[adapter.model_type]
    fields = {k: v for k, v in checkpoint.config.to_dict().items() if k not in NOT_CARRIED}
    config = config_class(**fields, lrkv=plan.lrkv_config(base), dtype=str(dtype).removeprefix("torch."))
    config.architectures, config.auto_map = [causal_class.__name__], auto_map(adapter.model_type)
    return config


def conversion_record(checkpoint: Checkpoint, plan: Plan, errors: list[dict[str, float]], options: dict, texts: list[Text],
                      tokens: torch.Tensor | None, sha256: str, seconds: float, stages: dict[str, float],
                      peak_bytes: int) -> dict:
    """The content of lrkv.json."""
    source = checkpoint.path / checkpoint.gguf if checkpoint.gguf else checkpoint.path
    return {
        "format": FORMAT,
        "source": {"name": checkpoint.source, "path": str(source.resolve()), "sha256": sha256, "model_type": checkpoint.config.model_type},
        "recipe": options,
        "versions": {"lrkv_convert": version("lrkv-convert"), "transformers": transformers.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "cache": {key: value for key, value in plan.as_dict().items() if key.startswith("kv_")},
        "keys": plan.keys,
        "layers": [{"layer": i, "keys": {"base_width": p.key_width, "rank": p.key_rank, "error": error["keys"]},
                    "values": {"base_width": p.value_width, "rank": p.value_rank, "error": error["values"]}}
                   for i, (p, error) in enumerate(zip(plan.layers, errors))],
        "calibration": {"texts": [{"name": t.name, "sha256": t.sha256, "bytes": len(t.content.encode())} for t in texts],
                        "tokens": tokens.numel() if tokens is not None else 0, "seq_len": tokens.shape[1] if tokens is not None else 0},
        "seed": None,       # nothing here is random: windows are spaced evenly, the fit starts from the data
        "seconds": round(seconds, 1),
        "seconds_per_stage": {stage: round(spent, 1) for stage, spent in stages.items()},
        "peak_memory_bytes": peak_bytes,
        "history": [],      # healing appends to this (heal/healing.py)
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def write_companions(folder: Path, checkpoint: Checkpoint, adapter: Adapter, config, record: dict, name: str) -> None:
    """Everything but the weights."""
    config.save_pretrained(folder)
    generation_config(checkpoint).save_pretrained(folder)
    try:
        checkpoint.tokenizer().save_pretrained(folder)
    except LrkvError:
        pass        # a model without a tokenizer converts too, uncalibrated
    modeling = Path(importlib.import_module(f"lrkv_convert.modeling.{adapter.modeling}").__file__)
    for file in [modeling, *map(Path, get_relative_import_files(modeling))]:
        shutil.copy(file, folder / file.name)
    if not checkpoint.gguf:
        for licence in checkpoint.path.glob("LICENSE*"):
            shutil.copy(licence, folder / licence.name)
    write_json(folder / RECORD, record)
    (folder / "README.md").write_text(model_card(record, source_licence(checkpoint.path), name), encoding="utf-8")


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The source's own, or what its config says."""
    try:
        return GenerationConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(checkpoint.config)


def source_licence(folder: Path) -> str | None:
    """The `license` of the source's model card, if it has one."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.M) if card.is_file() else None
    return found[1] if found else None


def model_card(record: dict, licence: str | None, name: str) -> str:
    """README.md of a converted folder."""
    cache, source = record["cache"], record["source"]
    rows = "\n".join(f"| {x['layer']} | {x['keys']['base_width']} + H·{x['keys']['rank']} | {x['keys']['error']:.3f} "
                     f"| {x['values']['base_width']} + H·{x['values']['rank']} | {x['values']['error']:.3f} |" for x in record["layers"])
    texts = ", ".join(t["name"] for t in record["calibration"]["texts"]) or "none (weights only)"
    title = Path(source["name"]).name if Path(source["name"]).exists() else source["name"]     # a path here says nothing to others
    front = f"license: {licence}\n" if licence else ""
    return f"""---
{front}library_name: transformers
pipeline_tag: text-generation
tags: [lrkv, kv-cache]
---
# {name}

`{title}` with LRKV attention (Low-Rank Key-Value attention, arXiv 2601.11471). Each token caches
**{cache['kv_bytes_per_token']:,} bytes instead of {cache['kv_bytes_per_token_before']:,} ({cache['kv_ratio']:.1%})**. Converted by lrkv-convert
{record['versions']['lrkv_convert']} {'and healed (below)' if record['history'] else 'without training'}; `base={record['recipe']['base']}`, `metric={record['recipe']['metric']}`, calibration: {texts}, {record['calibration']['tokens']:,} tokens.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

What it cost in quality: `lrkv compare {title} {name} --text FILE`. Limits are those of the source model, and its licence applies.
{"".join(healing_section(entry, i + 1, len(record["history"])) for i, entry in enumerate(record["history"]))}
## Fit

Numbers cached per token (shared base + H residuals of that rank) and relative error in the metric of the fit{', before healing' if record['history'] else ''}.

| layer | keys | error | values | error |
|---|---|---|---|---|
{rows}

Source weights sha256 `{source['sha256']}`; everything else about the conversion stands in `lrkv.json`.
"""


def healing_section(entry: dict, number: int, count: int) -> str:
    """One round of continued training, the number-th of `count`, in the model card; the picture in the folder is the last one's."""
    nll, recipe, names = entry["validation"]["nll"], entry["recipe"], {"converted": "converted" if number == 1 else "before"}
    base = nll.get("original", nll["converted"])
    rows = "\n".join(f"| {names.get(name, name)} | {math.exp(nll[name]):.3f} | ×{math.exp(nll[name] - base):.4f} |" for name in ("original", "converted", "healed") if name in nll)
    goal = {"kl": "divergence from the original", "ce": "cross-entropy"}.get(entry["loss"], "divergence from the original and cross-entropy")
    text = entry["validation"]["text"]
    where = "held out between the windows trained on" if text == "held out" else f"of {', '.join(text)}"
    return f"""
## Healing{f" {number}" if count > 1 else ""}

{entry['tokens']:,} tokens of {', '.join(entry['data'])} in {entry['steps']:,} steps ({entry['date']}): {goal}, {recipe['train']} weights,
{'Muon and AdamW' if recipe['optimizer'] == 'muon' else 'AdamW'}. On {entry['validation']['tokens']:,} tokens {where}:

| model | perplexity | ratio |
|---|---|---|
{rows}
{f"{chr(10)}![curve of the training]({entry['picture']}){chr(10)}" if entry['picture'] and number == count else ""}"""
