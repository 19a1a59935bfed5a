"""Telling a change of weights from what storing them in fewer bits does to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..tensors import rows_of

linalg: Any = torch.linalg  # has no types
_FLIPS = 3
_SWEEPS = 6  # of subspace iteration for the largest singular value; it comes within 1 % of it
_COLUMNS = 8


def units(base: Tensor, tuned: Tensor, dtypes: Iterable[torch.dtype]) -> float:
    """The largest |tuned - base|, counted in units in the last place.

    Args:
        base, tuned: float32, alike in shape. dtypes: those they are stored in; the coarser one of
            a value of this size counts.
    """
    if not base.numel():
        return 0.0
    _, exponent = torch.frexp(torch.maximum(base.abs(), tuned.abs()))
    unit = torch.zeros_like(base)
    for dtype in set(dtypes):
        about = torch.finfo(dtype)
        one = torch.full_like(base, about.eps).ldexp_(exponent - 1)
        unit = torch.maximum(unit, one.clamp_(min=about.smallest_normal * about.eps))
    return float(((tuned - base).abs() / unit).max())


def has_structure(change: Tensor, seed: int = 0) -> bool:
    """Whether a change of (out, in, *k) has a direction that noise of its size does not have.

    Its largest singular value is compared with that of the same numbers under random signs, which
    no low-rank part survives. What falls below it could not be told from noise by an SVD either.

    Reference: Hong, Sheng, Dobriban 2020, "Selecting the number of components in PCA via random
    signflips", section 3 (arXiv 2012.02985).
    """
    matrix = rows_of(change)
    if matrix is None or min(matrix.shape) < 2:
        return True
    generator = torch.Generator().manual_seed(seed)
    largest = _largest(matrix, generator)
    flipped = sum(_largest(_flipped(matrix, generator), generator) for _ in range(_FLIPS)) / _FLIPS
    # The largest singular value of noise varies by about n^(-2/3) of itself.
    return largest > flipped * (1 + 2 * min(matrix.shape) ** (-2 / 3))


def _flipped(matrix: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.empty(matrix.shape, dtype=torch.int8).random_(0, 2, generator=generator)
    return signs.mul_(2).sub_(1) * matrix


def _largest(matrix: Tensor, generator: torch.Generator) -> float:
    """The largest singular value, by subspace iteration."""
    columns = min(_COLUMNS, *matrix.shape)
    q = torch.randn(matrix.shape[1], columns, generator=generator)
    for _ in range(_SWEEPS):
        q = linalg.qr(matrix.T @ (matrix @ linalg.qr(q)[0]))[0]
    return float(linalg.matrix_norm(matrix @ q, 2))
