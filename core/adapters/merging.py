"""Adapters one after another into one weight, which one of them may enlarge for the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..errors import AdapterLabError
from .base import Algorithm

Range = tuple[int, int, int]  # axis, offset, length


def merge_all(weight: Tensor, parts: Iterable[tuple[Range | None, Algorithm]]) -> Tensor:
    """W' after every part, each at its strength already, on its own range of the weight.

    Args:
        weight: float32 (out, in, *k), overwritten.

    Returns:
        ``weight``, or another of the shape that a part asks for.

    Raises:
        AdapterLabError: as :func:`merge_part`.
    """
    for span, algorithm in parts:
        piece = weight if span is None else weight.narrow(*span)
        merged = merge_part(algorithm, piece)
        if span is None:
            weight = merged
        elif merged is not piece:
            piece.copy_(merged)
    return weight


def merge_part(algorithm: Algorithm, weight: Tensor) -> Tensor:
    """W + dW as by ``algorithm.merge``; dW goes into the corner of a weight that was enlarged.

    Raises:
        AdapterLabError: the delta does not fit, or depends on the values of an enlarged weight.
    """
    misfit = algorithm.misfit(weight.shape)
    if misfit is None:
        return algorithm.merge(weight)
    units = (1,) * (weight.ndim - len(algorithm.shape))
    corner = weight[tuple(slice(n) for n in (*algorithm.shape, *units))]
    if algorithm.misfit(corner.shape) is not None:
        raise AdapterLabError(f"{algorithm.title} does not fit its weight", found=misfit)
    if algorithm.reads_weight:
        raise AdapterLabError(
            f"{algorithm.title} cannot be merged into a weight that another adapter has enlarged",
            found=misfit,
            fix="Apply it before the adapter that enlarges the weight",
        )
    algorithm.merge(corner)
    return weight
