"""The families: the only place that knows tensor names and layouts. `adapter_for` looks a config's model_type up in the dict below."""
import difflib

from ..errors import LrkvError
from .base import Adapter, AttentionWeights, Geometry
from .families import FAMILIES

ADAPTERS: dict[str, Adapter] = {adapter.model_type: adapter for adapter in FAMILIES}

__all__ = ["ADAPTERS", "Adapter", "AttentionWeights", "Geometry", "adapter_for"]


def adapter_for(config) -> Adapter:
    """The adapter of a model's family. Raises LrkvError for unsupported families (naming the nearest), variants, and a single KV head."""
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None:
        near = difflib.get_close_matches(config.model_type, ADAPTERS, n=1, cutoff=0.0)[0]
        raise LrkvError(f"the family {config.model_type!r} is not supported", f"nearest supported: {near}; all: {', '.join(sorted(ADAPTERS))}")
    adapter.refuse(config)
    geometry = adapter.geometry(config)
    if geometry.kv_heads == 1:
        raise LrkvError("this model has one KV head (multi-query attention)", "there is nothing to share; LRKV needs at least two KV heads")
    return adapter
