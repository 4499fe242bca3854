"""`lrkv`: importing a command's module adds it to the app."""
from . import bench, compare, convert, demo, serve, sweep  # noqa: F401
from .app import app

__all__ = ["app"]
