"""A converted folder as a model of transformers, in one call."""

from pathlib import Path

from transformers import PreTrainedModel

from .errors import LrkvError
from .evaluate.load import location, read_config
from .families import CONVERTED
from .modeling import auto_class


def load(model: str | Path, **kwargs) -> PreTrainedModel:
    """The model of a converted folder, or of one on the hub, in eval mode, by this package's own
    classes. kwargs: of transformers' `from_pretrained`, such as dtype and device_map. Raises
    LrkvError for what is no converted model.
    """
    where, _ = location(str(model))
    family = str(read_config(str(model)).model_type)
    if not family.startswith(CONVERTED):
        raise LrkvError(f"{model} is no converted model", "transformers loads it as it is")
    auto = auto_class(family.removeprefix(CONVERTED))
    return auto.from_pretrained(where, **kwargs)  # type: ignore[attr-defined]
