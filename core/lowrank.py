"""Best low-rank factors of matrices and of sums of products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterLabError
from .tensors import length

_linalg: Any = torch.linalg  # has no types
_NOISE = 1e-6  # of the largest singular value; below is what float32 makes of zero
_BLOCK = 16  # vectors that a Krylov space grows by
_MISSING = 1e-3  # of the squared error: what may still be gained, 0.0005 of the error
_CANCELLED = 1e-4  # of a sum of squares
_ROUNDING = 1e-7  # of a sum of squares in float32
_CHUNK = 1 << 15  # numbers that are in float64 at once
_SMALL = 128  # side up to which a full SVD costs nothing
_COLUMNS = 256  # of a Gram matrix that are added at once


@dataclass(frozen=True)
class Spectrum:
    """U diag(S) V^T of a matrix, whole or cut.

    Attributes:
        u: (out, q). s: (q,), descending. vh: (q, in); all float32.
        total: ||M||_F, of all of it. nuclear: the sum of all its singular values, None where only
            the first are known.
        rest: ||M - U diag(S) V^T||.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    total: float
    nuclear: float | None = None
    rest: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the singular values left out are zero."""
        return not self.rest

    @property
    def rank(self) -> int:
        """How many of ``s`` are more than rounding noise, at least 1."""
        return max(1, int((self.s > _NOISE * self.s[:1]).sum()))

    def cut(self, rank: int) -> Spectrum:
        """With the first ``rank`` singular values and vectors only."""
        left = math.hypot(self.rest, length(self.s[rank:]))
        return replace(self, u=self.u[:, :rank], s=self.s[:rank], vh=self.vh[:rank], rest=left)

    def error(self, rank: int) -> float:
        """||M - M_rank|| / ||M||, 0 for a matrix of zeros."""
        left = math.hypot(self.rest, length(self.s[rank:]))
        return min(1.0, left / self.total) if self.total else 0.0


def factored(pairs: Sequence[tuple[Tensor, Tensor]]) -> Spectrum:
    """Of sum_i up_i down_i, exactly, by QR of the stacked factors and an SVD of r x r.

    The small SVD is in float64. At most min(out, in, sum of r_i) singular values.

    Args:
        pairs: (up (out, r_i), down (r_i, in)) of any float dtype.

    Raises:
        AdapterLabError: NaN or infinity in a factor.
    """
    ups, downs = zip(*pairs, strict=True)
    up, down = _finite(_wide(ups, 1)), _finite(_wide(downs, 0))
    (qu, ru), (qd, rd) = _linalg.qr(up), _linalg.qr(down.T)
    u, s, vh = _linalg.svd(ru.double() @ rd.double().T, full_matrices=False)
    total, nuclear = length(s), float(s.sum())
    u, s, vh = u.float(), s.float(), vh.float()
    return Spectrum(qu.float() @ u, s, vh @ qd.T.float(), total, nuclear)


def dense(matrix: Tensor, rank: int, *, exact: bool = False, seed: int = 0) -> Spectrum:
    """The first ``rank`` singular values and vectors of (out, in), or all if ``exact`` and
    wherever all are found in the same time.

    From the Krylov space of random vectors, deterministic for a seed, which grows until the error
    is within 1.001 of the best one. Exact, and where that space would be half of all: eigenvectors
    of the smaller Gram matrix in float64, whose singular values are off by 1e-8 of the largest,
    those of an SVD in float32 by 1e-7.

    Raises:
        AdapterLabError: NaN or infinity in the matrix.

    Reference: Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster
    Approximate Singular Value Decomposition", algorithm 2; Golub, Luk, Overton 1981, "A Block
    Lanczos Method for Computing the Singular Values .. of a Matrix".
    """
    matrix = matrix.float()
    if not _largest(matrix):
        return _zero(matrix)
    if exact or 2 * max(2 * rank, rank + _BLOCK) >= min(matrix.shape):
        return _whole(matrix)
    return _krylov(matrix, rank, seed) or _whole(matrix)


def until(
    matrix: Tensor, enough: Callable[[Spectrum], bool], *, start: int = 16, seed: int = 0
) -> Spectrum:
    """:func:`dense` of twice as many singular values again and again until they are ``enough``."""
    found = dense(matrix, start, seed=seed)
    while not (found.whole or enough(found)):
        start *= 2
        found = dense(matrix, start, seed=seed)
    return found


def _whole(matrix: Tensor) -> Spectrum:
    out, width = matrix.shape
    if min(out, width) <= _SMALL:
        u, s, vh = _linalg.svd(matrix.double(), full_matrices=False)
        return _known(u, s, vh)
    if out > width:
        turned = _whole(matrix.T)
        return replace(turned, u=turned.vh.T, vh=turned.u.T)
    parts = torch.split(matrix, _COLUMNS, 1)
    gram = matrix.new_zeros((out, out), dtype=torch.float64)
    for part in parts:
        gram.addmm_(part.double(), part.double().T)
    values, vectors = _linalg.eigh(gram)
    s, u = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    back = u.T / s.clamp(min=float(s[0]) * 1e-12)[:, None]
    return _known(u, s, torch.cat([(back @ part.double()).float() for part in parts], 1))


def _known(u: Tensor, s: Tensor, vh: Tensor) -> Spectrum:
    total, nuclear = length(s), float(s.sum())
    return Spectrum(u.float(), s.float(), vh.float(), total, nuclear)


def _krylov(matrix: Tensor, rank: int, seed: int) -> Spectrum | None:
    """By block Lanczos bidiagonalisation M V^T = U^T B, rows of U and V orthonormal, B
    (found, found) upper triangular; None where it takes more than half of all vectors.

    Each block of vectors lets the space hold more of the matrix; the last gains tell how much
    further ones would bring.
    """
    (out, width), most = matrix.shape, min(matrix.shape) // 2
    left, right = matrix.new_empty((most, out)), matrix.new_empty((most, width))
    b, total = matrix.new_zeros((most, most)), length(matrix)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    more = torch.randn(_BLOCK, width, generator=generator, device=matrix.device)
    held: list[float] = []  # of the squares, by so many blocks and more
    for found in range(_BLOCK, most + 1, _BLOCK):
        known, new = slice(found - _BLOCK), slice(found - _BLOCK, found)
        right[new], *_ = _orthonormal(more, right[known])
        left[new], b[known, new], b[new, new] = _orthonormal(right[new] @ matrix.T, left[known])
        if found >= rank + _BLOCK:
            held.append(_squares(b[:found, :found], rank))
            if _missing(held) <= _MISSING * max(total**2 - held[-1], _ROUNDING * total**2):
                u, s, vh = _linalg.svd(b[:found, :found])
                u, vh = left[:found].T @ u[:, :rank], vh[:rank] @ right[:found]
                return _measured(matrix, u, s[:rank], vh, total)
        more = left[new] @ matrix
    return None


def _orthonormal(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q, c, r) with rows^T = known^T c + q^T r, all rows of q and known orthonormal.

    Twice: where ``known`` holds the rows but for rounding, what is left has any direction.
    """
    c = rows @ known.T
    q, r = _linalg.qr((rows - c @ known).T)
    d = known @ q
    q, again = _linalg.qr(q - known.T @ d)
    return q.T, c.T + d @ r, again @ r


def _squares(b: Tensor, rank: int) -> float:
    """Sum of the squares of the first ``rank`` singular values."""
    wide = b.double()
    return float(_linalg.eigvalsh(wide @ wide.T)[-rank:].sum())


def _missing(held: Sequence[float]) -> float:
    """By how much a sequence will still grow whose gains fall like a geometric series."""
    if len(held) < 3:
        return math.inf
    before, gain = held[-2] - held[-3], held[-1] - held[-2]
    return gain * gain / (before - gain) if 0 < gain < before else max(gain, 0.0)


def _measured(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor, total: float) -> Spectrum:
    rest = total**2 - length(s) ** 2
    if rest < _CANCELLED * total**2:  # the difference is rounding noise: it has to be measured
        parts = zip(_split(matrix), _split(u * s, matrix.shape[1]), strict=True)
        rest = sum(length(part - up @ vh) ** 2 for part, up in parts)
    return Spectrum(u, s, vh, total, None, math.sqrt(rest) or math.ulp(total))


def _zero(matrix: Tensor) -> Spectrum:
    u, s, vh = (matrix.new_zeros(n) for n in ((len(matrix), 1), (1,), (1, matrix.shape[1])))
    return Spectrum(u, s, vh, 0.0, 0.0)


def _split(tensor: Tensor, width: int = 0) -> tuple[Tensor, ...]:
    """By rows, as many at once as may be in float64; those of a tensor of ``width`` columns."""
    width = width or (tensor.shape[1] if tensor.ndim > 1 else 1)
    return torch.split(tensor, max(1, _CHUNK // max(1, width)))


def _wide(factors: Sequence[Tensor], axis: int) -> Tensor:
    double = any(f.dtype == torch.float64 for f in factors)
    return torch.cat([f.double() if double else f.float() for f in factors], axis)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, which must be finite."""
    low, high = tensor.aminmax()
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise AdapterLabError(
            "A matrix to decompose is not finite", found="NaN or infinity",
            fix="Use an earlier or another copy of the file",
        )  # fmt: skip
    return largest


def _finite(tensor: Tensor) -> Tensor:
    _largest(tensor)
    return tensor
