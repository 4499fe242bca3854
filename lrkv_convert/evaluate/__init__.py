"""Measure models beside one another: perplexity, KL to the original, bytes really cached, time to
decode.
"""

from .bench import bench
from .compare import compare
from .load import load_model, load_tokenizer

__all__ = ["bench", "compare", "load_model", "load_tokenizer"]
