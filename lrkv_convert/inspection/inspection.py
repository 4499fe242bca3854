"""The story of a look:

original     checkpoint --calibrate--> metrics --spectra--> what a conversion would cost
             (--ablate: and what each head is worth)
converted    its original, on the same inputs --fidelity--> what the conversion did to each head

Everything is told by kind of attention: "self", and of an encoder-decoder "cross".
"""

from pathlib import Path

from ..errors import LrkvError
from ..examples.measured import MeasuredOn
from ..examples.text import read_one
from ..folder.places import writing
from ..folder.writer import RECORD, write_json
from ..source.configs import read_object
from ..study import Progress
from .ahead import TARGET_KL, ahead
from .beside import beside


def inspect(
    model: str,
    *,
    original: str | None = None,
    ranks: list[int] | None = None,
    target_kl: float = TARGET_KL,
    calibration: list[str] | None = None,
    calibration_tokens: int | None = None,
    ablate: bool = False,
    text: str | None = None,
    pairs: str | None = None,
    audio: str | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> dict:
    """Look at `model` (folder, .gguf file or hub id). Returns the JSON that docs/inspect.md
    describes. Raises LrkvError.

    An original: what it would cost to convert it, at `ranks` (default: up to eight, below
    break-even), with a recommendation for target_kl nats; ablate: also remove its heads one by one,
    and several at once, and measure the loss. A converted folder: how far each of its heads is from
    those of `original` (default: where its lrkv.json says). Measured on `text`, of an
    encoder-decoder on `pairs` or `audio` (default of a converted folder: the text that ships here).
    max_tokens: of that.
    """
    given = MeasuredOn(None if text is None else read_one(text), pairs, audio)
    if is_converted(model):
        if ablate or ranks or calibration or calibration_tokens:
            raise LrkvError(
                f"{model} is converted: it is compared with its original, not calibrated or"
                " ablated",
                "give the original to look ahead",
            )
        return beside(model, original or source_of(model), given, max_tokens, device, progress)
    if original is not None:
        raise LrkvError(
            f"{model} is not converted, so that it has no original",
            "leave --original out, or give a folder with an lrkv.json",
        )
    if ablate != bool(given):
        raise LrkvError(
            "--ablate measures the loss on --text, --pairs or --audio, and one was given without"
            " the other",
            "give something that was not calibrated on",
        )
    return ahead(
        model,
        ranks,
        target_kl,
        calibration,
        calibration_tokens,
        given,
        max_tokens,
        device,
        progress,
    )


def is_converted(model: str) -> bool:
    """Whether `model` is a folder that this project wrote."""
    folder = Path(model).expanduser()
    if (folder / RECORD).is_file():
        return True
    try:
        return str(read_object(folder / "config.json").get("model_type", "")).startswith("lrkv_")
    except (OSError, LrkvError):
        return False  # what is wrong with it is told when it is opened


def source_of(model: str) -> str:
    """Where the original of a converted folder lies. Raises LrkvError if it is not there any
    more.
    """
    try:
        source = read_object(Path(model).expanduser() / RECORD)["source"]
        path, name = str(source["path"]), source["name"]
    except (OSError, LrkvError, KeyError, TypeError) as error:
        raise LrkvError(
            f"{model} does not say what it was converted from", "give --original"
        ) from error
    if isinstance(path, str) and Path(path).exists():
        return path
    raise LrkvError(f"the original of {model}, {name}, is not where it was", "give --original")


def save(result: dict, folder: Path) -> list[Path]:
    """Write inspect.json and, where matplotlib is installed, heads.png and, of an ablation,
    ablation.png; returns what was written. Raises LrkvError.
    """
    files = [folder / "inspect.json"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(files[0], result)
    try:
        from . import plots
    except ImportError:
        return files
    draw = {"heads.png": plots.spectra_map if result["kind"] == "original" else plots.fidelity_map}
    if any("ablation" in row for row in result["attention"].values()):
        draw["ablation.png"] = plots.ablation_curves
    with writing(folder):
        for name, picture in draw.items():
            picture(result, folder / name)
    return [*files, *(folder / name for name in draw)]
