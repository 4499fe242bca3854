"""Convert pretrained attention to LRKV, a smaller key-value cache; see README.md.

    from lrkv_convert import convert
    convert("path/to/model", "path/to/output", rank=16)

Importing the package registers the converted families with transformers: their folders then load
without `trust_remote_code`. torch and transformers are imported when they are needed
(registration.py).
"""

import importlib
from typing import TYPE_CHECKING

from .errors import LrkvError
from .registration import register

if TYPE_CHECKING:
    from .conversion import Conversion, convert
    from .lora import lora_targets

__all__ = ["Conversion", "LrkvError", "convert", "lora_targets"]
__version__ = "0.2.0"
PLACES = {"Conversion": ".conversion", "convert": ".conversion", "lora_targets": ".lora"}

register()


def __getattr__(name: str):
    """What is imported with torch, when it is asked for."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
