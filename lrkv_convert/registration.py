"""Converted families are known to transformers once lrkv_convert is imported, although that imports
neither transformers nor the families.

transformers meets a model's family in `AutoConfig`. Its two ways in are wrapped, now or when its
module is imported, so that the first model of any kind that is loaded imports `modeling`, which
registers the families. Nothing is imported while transformers itself is half imported.
"""

import functools
import importlib
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"
WAYS = ("from_pretrained", "for_model")  # class methods of AutoConfig


def register() -> None:
    """Wrap them, or have them wrapped later. Called once, when the package is imported."""
    if AUTO in sys.modules:
        wrap(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, Wrapping())


class Wrapping(MetaPathFinder):
    """Finds that one module as the others do, and has it wrapped when it was executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                wrap(module)

            spec.loader.exec_module = exec_module
        return spec


def wrap(module: ModuleType) -> None:
    """Have AutoConfig import the families first."""
    for name in WAYS:
        setattr(module.AutoConfig, name, classmethod(after_families(vars(module.AutoConfig)[name])))


def after_families(method: classmethod):
    """What a class method does, after the families were imported."""

    @functools.wraps(method.__func__)
    def call(cls, *args, **kwargs):
        importlib.import_module("lrkv_convert.modeling")
        return method.__func__(cls, *args, **kwargs)

    return call
