"""Convert pretrained attention to LRKV, a smaller key-value cache; see README.md.

    from lrkv_convert import convert
    convert("path/to/model", "path/to/output", rank=16)

Importing the package costs next to nothing, because what it offers is imported when it is asked
for. transformers finds the converted families from then on: their folders load without
`trust_remote_code`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import LrkvError
from .registration import register

if TYPE_CHECKING:  # what an editor and a type checker see; __getattr__ gives the same
    from .conversion import Conversion, convert
    from .evaluate.bench import bench
    from .evaluate.compare import compare
    from .folder.travelling import refresh
    from .format import read_folder
    from .frontier import sweep
    from .healing import heal
    from .inspection.inspection import inspect
    from .loading import load
    from .lora import lora_targets
    from .plan.options import Options

__all__ = [
    "Conversion",
    "LrkvError",
    "Options",
    "bench",
    "compare",
    "convert",
    "heal",
    "inspect",
    "load",
    "lora_targets",
    "read_folder",
    "refresh",
    "sweep",
]
__version__ = "0.2.0"

# name -> the module that has it. No module of this package may be called like one of them: once
# imported, it would stand in the function's place
PLACES = {
    "Conversion": "conversion",
    "Options": "plan.options",
    "bench": "evaluate.bench",
    "compare": "evaluate.compare",
    "convert": "conversion",
    "heal": "healing",
    "inspect": "inspection.inspection",
    "load": "loading",
    "lora_targets": "lora",
    "read_folder": "format",
    "refresh": "folder.travelling",
    "sweep": "frontier",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{PLACES[name]}", __name__), name)
    globals()[name] = found  # from now on without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
