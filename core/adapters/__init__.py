"""One module per algorithm, found by discovery. ``ALGORITHMS`` is what menus and tests read."""

from __future__ import annotations

import inspect
from functools import lru_cache

from ..errors import AdapterLabError
from ..registry import Registry
from .base import Algorithm, Tensors
from .config import VARIANTS, AdapterConfig
from .draw import Draw
from .merging import merge_all, merge_part
from .ordered import Ordered
from .reading import read_number
from .scalar import SCALAR
from .wrapper import Wrapper

__all__ = [
    "ALGORITHMS", "VARIANTS", "WRAPPERS", "AdapterConfig", "Algorithm", "Draw", "Ordered",
    "Tensors", "Wrapper",
    "load", "load_parts", "merge_all", "merge_part", "suffixes",
]  # fmt: skip

ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")
WRAPPERS: Registry[type[Wrapper]] = Registry("wrapper")


def _algorithm(item: object) -> str | None:
    if inspect.isclass(item) and issubclass(item, Algorithm) and not inspect.isabstract(item):
        return None if issubclass(item, Wrapper) else item.name
    return None


def _wrapper(item: object) -> str | None:
    if inspect.isclass(item) and issubclass(item, Wrapper) and item.suffixes:
        return item.__name__
    return None


ALGORITHMS.discover(__name__, __path__, _algorithm)
WRAPPERS.discover(__name__, __path__, _wrapper)


def load(tensors: Tensors, scale: float | None = None) -> Algorithm | None:
    """What ``tensors`` (suffix -> tensor of one stem) do to the weight; None for nothing.

    Raises:
        AdapterLabError: malformed tensors, or tensors of two algorithms.
    """
    return load_parts(tensors, scale).get("weight")


def load_parts(tensors: Tensors, scale: float | None = None) -> dict[str, Algorithm]:
    """Parameter ("weight", "bias") -> what ``tensors`` of one module do to it.

    Raises:
        AdapterLabError: malformed tensors, tensors of two algorithms, or nothing that a ``scalar``
            or the tensors of a wrapper could act on, beside a bias.
    """
    parts: dict[str, Algorithm] = {}
    for algorithm in _owners(tuple(tensors)):
        loaded = algorithm.load(tensors, scale)
        if loaded is None:
            continue
        other = parts.setdefault(algorithm.parameter, loaded)
        if other is not loaded:
            found = f"{other.title} and {loaded.title}: {', '.join(tensors)}"
            raise AdapterLabError("Two algorithms on one module", found=found)
    if "weight" in parts:
        parts["weight"] = _wrapped(parts["weight"], tensors)
        bias = parts["weight"].bias
        if bias is not None:
            if "bias" in parts:
                raise AdapterLabError("Two biases on one module", found=", ".join(tensors))
            parts["bias"] = bias
    elif parts:
        asking = {SCALAR, *(suffix for w in WRAPPERS.values() for suffix in w.suffixes)}
        lone = [suffix for suffix in tensors if suffix in asking]
        if lone:
            raise AdapterLabError(f"'{lone[0]}' has no factors", found=", ".join(tensors))
    return parts


@lru_cache(1 << 10)
def _owners(names: tuple[str, ...]) -> tuple[type[Algorithm], ...]:
    """The algorithms with a factor among ``names``: the modules of a file have few different."""
    return tuple(a for a in ALGORITHMS.values() if any(map(a.owns, names)))


def _wrapped(algorithm: Algorithm, tensors: Tensors) -> Algorithm:
    if SCALAR in tensors:
        algorithm = algorithm.at(read_number(tensors, SCALAR, 1.0))
    for wrapper in WRAPPERS.values():
        if any(suffix in tensors for suffix in wrapper.suffixes):
            algorithm = wrapper.wrap(algorithm, tensors)
    return algorithm


def suffixes() -> list[str]:
    """Every canonical suffix that some algorithm or wrapper knows; ``*`` stands for one name."""
    owners = (*ALGORITHMS.values(), *WRAPPERS.values())
    return [*dict.fromkeys(s for owner in owners for s in owner.suffixes), SCALAR, "alpha"]
