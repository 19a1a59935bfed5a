"""One module per algorithm, found by discovery. ``ALGORITHMS`` is what menus and tests read."""

from __future__ import annotations

import inspect

from ..registry import Registry
from .base import AdapterConfig, Algorithm, Tensors

__all__ = ["ALGORITHMS", "AdapterConfig", "Algorithm", "load"]

ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")


def _name(item: object) -> str | None:
    if inspect.isclass(item) and issubclass(item, Algorithm) and not inspect.isabstract(item):
        return item.name
    return None


ALGORITHMS.discover(__name__, __path__, _name)


def load(tensors: Tensors, scale: float | None = None) -> Algorithm | None:
    """The algorithm whose factors ``tensors`` (suffix -> tensor of one stem) are, or None."""
    for algorithm in ALGORITHMS.values():
        loaded = algorithm.load(tensors, scale)
        if loaded is not None:
            return loaded
    return None
