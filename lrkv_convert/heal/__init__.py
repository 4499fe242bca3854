"""Short continued pretraining of a converted model, which gives back quality that the conversion
cost.
"""

from .healing import Healing, heal
from .options import Options

__all__ = ["Healing", "Options", "heal"]
