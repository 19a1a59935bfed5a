"""The Kronecker product nearest to a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..lowrank import Spectrum, dense
from ..tensors import factorization, length

_SWEEPS = 30
_ENOUGH = 1e-5  # relative gain of a sweep that is not worth another


class Nearest:
    """min ||D - W1 (x) W2|| over W1 (a, b) and W2 (c, d, *k), W2 of rank r if that is smaller.

    With the blocks of D as rows, R[(i, j), (k, l)] = D[i c + k, j d + l], the product becomes
    vec W1 vec W2^T, so that the nearest one is the first singular pair of R. A W2 of lower rank is
    fitted by turns: W1 to W2, then W2 to W1, its SVD cut; the error falls at each turn.

    Args:
        delta: (out, in, *k), float32. factor: as LyCORIS splits the two dimensions.

    Reference: Van Loan, Pitsianis 1993, "Approximation with Kronecker Products", section 2.
    """

    def __init__(self, delta: Tensor, factor: int, *, exact: bool = False, seed: int = 0) -> None:
        (self.a, self.c), (self.b, self.d) = (factorization(n, factor) for n in delta.shape[:2])
        self.kernel = tuple(delta.shape[2:])
        self.columns = self.d * math.prod(self.kernel)
        blocks = delta.reshape(self.a, self.c, self.b, self.columns)
        self.blocks = blocks.transpose(1, 2).reshape(self.a * self.b, self.c * self.columns)
        self.total = length(delta)
        found = dense(self.blocks, 1 if exact else 8, exact=exact, seed=seed)
        first = found.vh[0]
        for _ in range(0 if exact else _SWEEPS):
            before, first = first, self._other(self._outer(first))
            if length(first - before) < _ENOUGH:
                break
        self.second = (self.blocks.T @ self._outer(first)).reshape(self.c, self.columns)

    def spectrum(self) -> Spectrum:
        """Of W2, (c, d * prod(k)), with W1 of length 1."""
        return dense(self.second, 0, exact=True)

    def full(self) -> tuple[Tensor, Tensor, float]:
        """W1, W2 and ||D - W1 (x) W2||, the lengths of both alike."""
        size = length(self.second)
        first = self._outer(self.second.flatten() / size)
        second = self.second.reshape(self.c, self.d, *self.kernel)
        root = math.sqrt(size)
        return (first * root).reshape(self.a, self.b), second / root, self._rest(size)

    def low(self, rank: int) -> tuple[Tensor, Spectrum, float]:
        """W1, W2's first ``rank`` singular values and vectors, and the error."""
        matrix, size = self.second, 0.0
        first = self._outer(matrix.flatten() / length(matrix))
        cut = dense(matrix, 0, exact=True).cut(rank)
        for _ in range(_SWEEPS):
            before, size = size, length(cut.s)
            if size <= before * (1 + _ENOUGH):
                break
            product = (cut.u * cut.s) @ cut.vh
            first = self._outer(product.flatten() / size)
            matrix = (self.blocks.T @ first).reshape(self.c, self.columns)
            cut = dense(matrix, 0, exact=True).cut(rank)
        size = length(cut.s)
        return first.reshape(self.a, self.b), cut, self._rest(size)

    def _outer(self, inner: Tensor) -> Tensor:
        """vec W1 of length 1 that suits vec W2."""
        return _unit(self.blocks @ inner)

    def _other(self, outer: Tensor) -> Tensor:
        return _unit(self.blocks.T @ outer)

    def _rest(self, kept: float) -> float:
        return math.sqrt(max(0.0, self.total**2 - kept**2))


def _unit(vector: Tensor) -> Tensor:
    return vector / max(length(vector), torch.finfo(vector.dtype).tiny)


def split(shape: Sequence[int], factor: int) -> tuple[int, int]:
    """(c, d): the sizes of W2 for a weight of ``shape``."""
    return factorization(shape[0], factor)[1], factorization(shape[1], factor)[1]
