"""What stands beside the weights: config, tokenizer, modelling files, the record lrkv.json, and the
model card (folder/card.py).
"""

import datetime
import importlib.util
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
import transformers

from ..errors import LrkvError
from ..families import Family, family_of
from ..format import (
    FIELDS,
    HALF_SPLIT,
    Attention,
    Cached,
    Calibration,
    Cost,
    Evaluation,
    Fit,
    Geometry,
    Layer,
    Record,
    Source,
    Versions,
)
from ..forms.base import plain
from ..modeling import CLASSES, auto_map
from ..plan.shapes import Plan, SitePlan
from ..source import Checkpoint
from .card import PICTURE, model_card, source_metadata
from .provenance import public_name
from .record import read_record
from .travelling import write_modeling
from .writer import RECORD, write_json, write_text

NOT_CARRIED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "quantization_config",
)


def converted_config(
    checkpoint: Checkpoint, family: Family, plans: dict[str, Plan], dtype: torch.dtype, base: str
):
    """The converted model's config: the source's, with its own model_type, the classes' places, and
    the field of each kind of attention, None for a kind that stays as it was.
    """
    model_type = family.model_type
    config_class, _, head_class = CLASSES[model_type]
    spec = {
        kind: cached(plans[kind], base).to_json() if kind in plans else None
        for kind in family.kinds
    }
    carried = {
        name: value
        for name, value in checkpoint.config.to_dict().items()
        # of another conversion: ours are `lrkv`
        if name not in NOT_CARRIED and not name.startswith("lrkv")
    }
    config = config_class(
        **carried,
        **{FIELDS[kind]: value for kind, value in spec.items()},
        dtype=str(dtype).removeprefix("torch."),
    )
    config.architectures, config.auto_map = [head_class.__name__], auto_map(model_type)
    return config


def cached(plan: Plan, base: str) -> Cached:
    """The config's field of a kind of attention. base: how the bases were found (Options.base)."""
    turned = {site.layer: site.geometry.rotary_dim for site in plan.sites}
    found = Cached.from_json(plan.lrkv_config(base), "the plan")
    rotary = any(turned.values())
    return replace(
        found,
        rope_layout=HALF_SPLIT if rotary else None,
        rotary_dim=tuple(turned.get(i, 0) for i in range(plan.layers)),
        # without RoPE nothing was rotated, whatever the form
        keys=found.keys if rotary else replace(found.keys, rotated_in_cache=()),
    )


def add_found(spec: dict, layer: int, layers: int, found: dict[str, dict]) -> None:
    """Put what the fit of a layer found of either side into a field of the config, lists with an
    entry per layer.
    """
    for side, values in found.items():
        for name, value in values.items():
            spec[side].setdefault(name, [None] * layers)[layer] = value


def conversion_record(
    checkpoint: Checkpoint,
    plans: dict[str, Plan],
    errors: list[dict[str, dict[str, float]]],
    options: dict,
    calibration: dict,
    sha256: str,
    seconds: float,
    stages: dict[str, float],
    peak_bytes: int | None,
) -> Record:
    """The content of lrkv.json. errors: of every layer, by kind; calibration: `Material.record`."""
    source = checkpoint.path / checkpoint.gguf if checkpoint.gguf else checkpoint.path
    return Record(
        source=Source(
            name=public_name(checkpoint.source),
            path=str(source.resolve()),
            sha256=sha256,
            model_type=checkpoint.config.model_type,
        ),
        notices=tuple(checkpoint.notices),
        recipe=options,
        versions=Versions(
            lrkv_convert=version("lrkv-convert"),
            transformers=transformers.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
        ),
        attention={
            kind: _fitted(plan, errors, kind, checkpoint.config) for kind, plan in plans.items()
        },
        calibration=Calibration.from_json(calibration),
        seconds=round(seconds, 1),
        seconds_per_stage={stage: round(spent, 1) for stage, spent in stages.items()},
        peak_memory_bytes=peak_bytes,
    )


def _fitted(plan: Plan, errors: list[dict[str, dict[str, float]]], kind: str, config) -> Attention:
    paths = {site.layer: site.path for site in family_of(config).sites(config, [kind])}

    def layer(site: SitePlan) -> Layer:
        error = errors[site.layer][kind]
        fit = lambda shape, side: Fit(
            base_width=shape.width,
            rank=shape.rank,
            codes=plain(shape.codes) if shape.coded else None,
            groups=shape.groups if shape.groups > 1 else None,
            error=error[side],
        )
        return Layer(
            layer=site.layer,
            path=paths[site.layer],
            rotary_dim=site.geometry.rotary_dim,
            keys=fit(site.keys, "keys"),
            values=fit(site.values, "values"),
        )

    return Attention(
        cache=Cost.from_json(plan.cache()),
        keys=plan.keys,
        geometry=Geometry.from_json({"layers": plan.layers, **asdict(plan.geometry)}),
        rope_layout=HALF_SPLIT if any(site.geometry.rotary for site in plan.sites) else None,
        layers=tuple(map(layer, plan.sites)),
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def write_companions(
    folder: Path, checkpoint: Checkpoint, family: Family, config, record: Record, name: str
) -> None:
    """Everything but the weights."""
    config.save_pretrained(folder)
    checkpoint.generation_config().save_pretrained(folder)
    with suppress(LrkvError):  # a model without a tokenizer converts too, uncalibrated
        checkpoint.tokenizer().save_pretrained(folder)
    write_modeling(folder, family.model_type)
    if not checkpoint.gguf:
        # how speech is read
        for file in (
            *checkpoint.path.glob("LICENSE*"),
            *(checkpoint.path.glob("*processor_config.json") if family.encoder else ()),
        ):
            shutil.copy(file, folder / file.name)
    write_json(folder / RECORD, record.to_json())
    if family.encoder is None:
        draw_cache(record, name, folder / PICTURE)
    write_card(folder, record, {} if checkpoint.gguf else source_metadata(checkpoint.path), name)


def draw_cache(record: Record, name: str, file: Path) -> None:
    """The picture in the card, where matplotlib is installed and works: no conversion is lost for a
    picture.
    """
    if not importlib.util.find_spec("matplotlib"):
        return
    try:
        from .. import plot

        plot.cache(record, name, file)
    # a broken installation, a name that it cannot set: the card does without
    except Exception:
        file.unlink(missing_ok=True)


def add_evaluation(folder: Path, result: dict) -> None:
    """Write what a comparison found of the converted model in `folder`, one of its models, into its
    lrkv.json and its card. An earlier measurement of the same texts in the same windows is
    replaced.
    """
    found = next(
        i
        for i, row in enumerate(result["models"])
        if i and row["cache"] is None and Path(row["path"]).expanduser() == folder
    )
    record = read_record(folder)
    measured = {
        "date": datetime.date.today().isoformat(),
        "texts": [t["name"] for t in result["texts"]],
        "sha256": [t["sha256"] for t in result["texts"]],
        "tokens": result["tokens"],
        "seq_len": result.get("seq_len"),
        "dtype": result["models"][found]["dtype"],
        "rows": [
            {
                key: value
                for key, value in result["models"][i].items()
                if key not in ("path", "cache", "context", "written")
            }
            for i in (0, found)
        ],
    }
    if far := result.get("retrieval"):
        of_models = [far["models"][i]["tasks"] for i in (0, found)]
        measured["retrieval"] = {**far, "models": [_told(tasks) for tasks in of_models]}
    new = Evaluation.from_json(measured, "the comparison")
    others = (other for other in record.evaluations if not other.same(new))
    record = replace(record, evaluations=(*others, new))
    write_json(folder / RECORD, record.to_json())
    write_card(folder, record, source_metadata(folder), os.path.basename(os.path.abspath(folder)))


def _told(tasks: list[dict]) -> list[dict]:
    """What a card tells of retrieval tasks."""
    return [{key: value for key, value in row.items() if key != "depths"} for row in tasks]


def write_card(folder: Path, record: Record, carried: dict, name: str) -> None:
    """README.md of a converted folder that will be called `name`."""
    write_text(
        folder / "README.md",
        model_card(record, carried, name, picture=(folder / PICTURE).is_file()),
    )
