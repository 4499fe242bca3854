"""What the terminal shows. The only importer of rich."""

from .comparison import show_comparison
from .conversion import show_conversion, show_location, show_plan
from .inspection import show_expectation, show_fidelity, show_files
from .parts import progress, say, show_notices
from .speed import show_bench, show_sweep
from .training import healing, show_healing, show_recipes

__all__ = [
    "healing",
    "progress",
    "say",
    "show_bench",
    "show_comparison",
    "show_conversion",
    "show_expectation",
    "show_fidelity",
    "show_files",
    "show_healing",
    "show_location",
    "show_notices",
    "show_plan",
    "show_recipes",
    "show_sweep",
]
