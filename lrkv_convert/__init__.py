"""Convert pretrained attention to LRKV, a smaller key-value cache; see README.md.

    from lrkv_convert import convert
    convert("path/to/model", "path/to/output", rank=16)

Importing the package registers the converted families with transformers: their folders then load
without `trust_remote_code`.
"""

from . import modeling  # noqa: F401  (registers the model classes)
from .conversion import Conversion, convert
from .errors import LrkvError
from .lora import lora_targets

__all__ = ["Conversion", "LrkvError", "convert", "lora_targets"]
__version__ = "0.2.0"
