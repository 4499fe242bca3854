"""Measure models beside one another: perplexity, KL to the original, bytes really cached."""
from .compare import compare
from .load import load_model, load_tokenizer

__all__ = ["compare", "load_model", "load_tokenizer"]
