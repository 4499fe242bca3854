"""The converted families made known to transformers, without importing it: `lrkv --help` imports
this package, and transformers and torch take seconds.

Where transformers is imported already, the model classes are registered at once. Otherwise they are
as soon as it is, by a finder in front of Python's own, which adds that step to its import.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

MODELS = "lrkv_convert.modeling"  # importing it registers
TRANSFORMERS = "transformers"


class AfterTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, and has the models imported after it."""

    def find_spec(self, fullname, path, target=None) -> ModuleSpec | None:
        if fullname != TRANSFORMERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def and_register(module) -> None:
            execute(module)
            importlib.import_module(MODELS)

        spec.loader.exec_module = and_register
        return spec


def register() -> None:
    """Register now, or when transformers is imported."""
    if TRANSFORMERS in sys.modules:
        importlib.import_module(MODELS)
    else:
        sys.meta_path.insert(0, AfterTransformers())
