"""The model card of a converted folder: what it is, from what, by which commands, what it cost, how to load and serve it.

The metadata in front is the hub's; what the source says of its licence and languages is carried over, for it goes on to apply.
"""
import math
import re
from pathlib import Path

import yaml

from .provenance import commands

CARRIED = ("license", "license_name", "license_link", "language")
PICTURE = "cache.png"


def source_metadata(folder: Path) -> dict:
    """What the model card in a folder says of licence and languages; {} without one."""
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---\s*$", card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "", re.S | re.M)
    try:
        found = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        return {}
    return {name: found[name] for name in CARRIED if name in found} if isinstance(found, dict) else {}


def metadata(record: dict, carried: dict, name: str) -> dict:
    """The YAML in front of the card. carried: `source_metadata` of the source, or of an earlier card of this model."""
    source = record["source"]["name"]
    found = {**carried, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lrkv", "kv-cache"]}
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        found["base_model"] = source
    results = {result["dataset"]["name"]: result for measured in record.get("evaluations", []) for result in _results(measured)}     # of each text the last
    if results:
        found["model-index"] = [{"name": name, "results": list(results.values())}]
    return found


def _results(measured: dict) -> list[dict]:
    """One evaluation as the hub's metadata has it: a result per text."""
    return [{"task": {"type": "text-generation"}, "dataset": {"name": text["name"], "type": text["name"]},
             "metrics": [{"type": "perplexity", "value": round(text["perplexity"], 4)}]} for text in measured["rows"][-1]["texts"]]


def model_card(record: dict, carried: dict, name: str, picture: bool = False) -> str:
    """README.md of a converted folder called `name`. picture: whether PICTURE lies beside it."""
    cache, source, history = record["cache"], record["source"]["name"], record["history"]
    texts = ", ".join(t["name"] for t in record["calibration"]["texts"]) or "none (weights only)"
    rows = "\n".join(f"| {x['layer']} | {x['keys']['base_width']} + H·{x['keys']['rank']} | {x['keys']['error']:.3f} "
                     f"| {x['values']['base_width']} + H·{x['values']['rank']} | {x['values']['error']:.3f} |" for x in record["layers"])
    front = yaml.safe_dump(metadata(record, carried, name), sort_keys=False, allow_unicode=True)
    licence = f"The licence of the source, {carried['license']}, applies." if "license" in carried else "The licence of the source model applies; no card beside the weights named one."
    return f"""---
{front}---
# {name}

`{source}` with LRKV attention (Low-Rank Key-Value attention, arXiv 2601.11471). Each token caches
**{cache['kv_bytes_per_token']:,} bytes instead of {cache['kv_bytes_per_token_before']:,} ({cache['kv_ratio']:.1%})**. Converted by lrkv-convert
{record['versions']['lrkv_convert']} {'and healed (below)' if history else 'without training'}; calibration: {texts}, {record['calibration']['tokens']:,} tokens.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

The attention lies in the Python files beside the weights, which is what `trust_remote_code` allows; with lrkv-convert installed, `import lrkv_convert`
does instead. To serve it (OpenAI-compatible): `lrkv serve {name}`.

## How it was made

```bash
{chr(10).join(commands(record, name.rpartition("/")[2]))}
```

## What it cost

{_evaluations(record) or f"Not measured yet: `lrkv compare {source} {name} --text FILE --card` writes perplexity beside the source's here."}
{"".join(healing_section(entry, i + 1, len(history)) for i, entry in enumerate(history))}
## Limits

Those of the source model. What is cached is an approximation of its keys and values: texts unlike those of the calibration{' and the training' if history else ''} lose more, so
measure on yours. {licence}

## Fit

Numbers cached per token (shared base + H residuals of that rank) and relative error in the metric of the fit{', before healing' if history else ''}.
{f"{chr(10)}![what each layer caches]({PICTURE}){chr(10)}" if picture else ""}
| layer | keys | error | values | error |
|---|---|---|---|---|
{rows}

Source weights sha256 `{record['source']['sha256']}`; everything else about the conversion stands in `lrkv.json`.
"""


def _evaluations(record: dict) -> str:
    """Tables of what `lrkv compare --card` measured."""
    tables = []
    for measured in record.get("evaluations", []):
        rows = "\n".join(f"| {row['name'].replace('|', '/')} | {row['perplexity']:.3f} | ×{row['ratio']:.4f}{_spread(row)} | {row['kl']:.4f} | {row['top1_agreement']:.1%} | {row['kv_ratio']:.1%} |"
                         for row in measured["rows"])
        tables.append(f"{', '.join(measured['texts'])}: {measured['tokens']:,} tokens predicted in windows of {measured['seq_len']}, {measured['dtype']}, {measured['date']}.\n\n"
                      f"| model | perplexity | ratio (95 % interval) | KL to `{measured['rows'][0]['name']}` | same top token | cache |\n|---|---|---|---|---|---|\n{rows}\n")
    return "\n".join(tables)


def _spread(row: dict) -> str:
    return f" ({row['ratio_low']:.4f}–{row['ratio_high']:.4f})" if row["ratio_low"] is not None else ""


def healing_section(entry: dict, number: int, count: int) -> str:
    """One round of continued training, the number-th of `count`; the picture in the folder is the last one's."""
    nll, recipe, names = entry["validation"]["nll"], entry["recipe"], {"converted": "converted" if number == 1 else "before"}
    base = nll.get("original", nll["converted"])
    rows = "\n".join(f"| {names.get(name, name)} | {math.exp(nll[name]):.3f} | ×{math.exp(nll[name] - base):.4f} |" for name in ("original", "converted", "healed") if name in nll)
    goal = {"kl": "divergence from the original", "ce": "cross-entropy"}.get(entry["loss"], "divergence from the original and cross-entropy")
    text = entry["validation"].get("text", "held out")
    where = "held out between the windows trained on" if text == "held out" else f"of {', '.join(text)}"
    return f"""
## Healing{f" {number}" if count > 1 else ""}

{entry['tokens']:,} tokens of {', '.join(entry['data'])} in {entry['steps']:,} steps ({entry['date']}): {goal}, {recipe['train']} weights,
{'Muon and AdamW' if recipe['optimizer'] == 'muon' else 'AdamW'}. On {entry['validation']['tokens']:,} tokens {where}:

| model | perplexity | ratio |
|---|---|---|
{rows}
{f"{chr(10)}![curve of the training]({entry['picture']}){chr(10)}" if entry['picture'] and number == count else ""}"""
