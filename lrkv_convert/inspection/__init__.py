"""Look inside attention: what a conversion would cost before it is done, what it did to each head
afterwards, and what a head is worth.
"""

from .inspection import inspect, save

__all__ = ["inspect", "save"]
