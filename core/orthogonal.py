"""Rotations of the rows of a matrix: how they are written, and how they act."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Elements to work on at a time: a core's cache holds them; other devices take larger steps.
_STEP, _BUTTERFLY_STEP, _DEVICE_STEP = 1 << 16, 1 << 18, 1 << 24
_LINALG: Any = torch.linalg  # torch ships no types for it
_WIDEST = 64  # rows that fused stages of a butterfly may mix
_SMALL, _REST = 0.7, 3e-8  # spectral norms of Q that a series is summed for, and ends at


def exact(factor: Tensor, like: Tensor) -> Tensor:
    """``factor`` in float64 on the device of ``like``, or on the CPU if that has no float64."""
    device = torch.device("cpu") if like.device.type == "mps" else like.device
    return factor.to(device, torch.float64)


def eye(like: Tensor) -> Tensor:
    """I (b, b) for blocks (.., b, b)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def skew(blocks: Tensor) -> Tensor:
    """Q = B - B^T, (.., b, b)."""
    return blocks - blocks.mT


def cayley(q: Tensor) -> Tensor:
    """R - I of R = (I + Q)(I - Q)^-1, as 2 (I - Q)^-1 Q, which loses no digits to the I.

    The backward pass needs R alone: dR = (R + I) dQ (R + I) / 2.

    Args:
        q: skew-symmetric, (..., b, b).
    """
    return _Cayley.apply(q)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        change = _solved(q)
        ctx.save_for_backward(change)
        return change

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        inverse = (change + 2 * eye(change)).mT
        return torch.matmul(inverse, grads[0] / 2) @ inverse


def _solved(q: Tensor) -> Tensor:
    """2 (I - Q)^-1 Q; of small rotations in float32 on a CPU, which is slow to solve many small
    systems, by 2 (Q + Q^2 + ..), doubling the number of terms until the rest is lost in rounding.
    """
    if q.device.type == "cpu" and q.dtype == torch.float32 and q.numel():
        # Singular values of a skew-symmetric matrix come in pairs.
        bound = math.sqrt(float(q.square().sum((-1, -2)).max()) / 2)
        if bound < _SMALL:
            flat = q.flatten(0, -3)
            power = flat @ flat
            change, bound = 2 * (flat + power), bound**2
            while bound > _REST:
                change = torch.baddbmm(change, power, change)
                bound = bound**2
                power = power @ power if bound > _REST else power
            return change.view(q.shape)
    half: Tensor = _LINALG.solve(eye(q) - q, q)
    return 2 * half


def neumann(q: Tensor, terms: int) -> Tensor:
    """R - I of the series that peft puts in the place of (I + Q)(I - Q)^-1.

    R = I + 2 Q + 2 Q^2 + .. + 2 Q^(n-2) + Q^(n-1) with n = ``terms``; for n = 2 I + 2 Q, for
    n = 3 what n = 4 gives, for n = 1 I.

    Args:
        q: skew-symmetric, (..., b, b). terms: 1 or more.

    Reference: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", section 4.2; peft 0.21.2.
    """
    if terms <= 1:
        return torch.zeros_like(q)
    change, power = 2 * q, q
    for n in range(2, max(terms, 4) if terms > 2 else 2):
        power = power @ q
        change = change + (power if n == max(terms, 4) - 1 else 2 * power)
    return change


def shrunk(q: Tensor, limit: float) -> Tensor:
    """Q with its Frobenius norm, one over all blocks, brought down to ``limit`` (COFT).

    Reference: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    section 3.3; the 1e-8 is that of LyCORIS.
    """
    norm = frobenius(q) + 1e-8
    return q * (limit / norm).clamp(max=1.0)


def frobenius(q: Tensor) -> Tensor:
    """||Q||_F of all blocks together; its gradient at Q = 0, where training begins, is 0."""
    return _LINALG.vector_norm(q)


def reflections(vectors: Tensor, orthonormal: bool) -> tuple[Tensor, Tensor]:
    """U and U T of H_1 H_2 .. H_r = I - U T U^T, H_i = I - 2 u_i u_i^T / ||u_i||^2.

    Args:
        vectors: the u_i, (n, r), float64; a column of zeros reflects nothing.
        orthonormal: make them orthonormal first, in their order; T is then 2 I.

    Reference: Schreiber and Van Loan 1989, "A Storage-Efficient WY Representation for Products of
    Householder Transformations", section 2.
    """
    if orthonormal:
        u: Tensor = _LINALG.qr(vectors).Q
        return u, 2 * u
    u = vectors / vectors.square().sum(0).sqrt().clamp(min=torch.finfo(vectors.dtype).tiny)
    gram = u.T @ u
    # T^-1 = I / 2 + the part of U^T U above the diagonal.
    turned: Tensor = _LINALG.solve_triangular(
        gram.triu(1) + eye(gram) / 2, u, upper=True, left=False
    )
    return u, turned


@dataclass(frozen=True)
class Blocks:
    """M = I + diag(E_1, E_2, ..), a block-diagonal matrix.

    Args:
        parts: E_k of consecutive ranges of rows, each (n, b, b).
    """

    parts: tuple[Tensor, ...]

    @property
    def transposed(self) -> Blocks:
        return Blocks(tuple(e.mT for e in self.parts))

    def to(self, like: Tensor) -> Blocks:
        return Blocks(tuple(e.to(like) for e in self.parts))

    def change(self, x: Tensor) -> Tensor:
        """(M - I) x of x (rows, columns) with any strides."""
        return torch.cat([torch.bmm(e, rows).flatten(0, 1) for e, rows in self._ranges(x)])

    def apply_(self, x: Tensor) -> None:
        """x = M x in place, a few blocks at a time."""
        for e, rows in self._ranges(x):
            wanted = _STEP if x.device.type == "cpu" else _DEVICE_STEP
            step = max(1, wanted // rows[0].numel())
            for matrix, part in zip(
                torch.split(e + eye(e), step), torch.split(rows, step), strict=True
            ):
                part.copy_(torch.bmm(matrix, part))

    def _ranges(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = [len(e) * e.shape[-1] for e in self.parts]
        for e, rows in zip(self.parts, torch.split(x, sizes), strict=True):
            yield e, rows.view(*e.shape[:2], x.shape[1])


@dataclass(frozen=True)
class Butterfly:
    """M = M_m .. M_2 M_1, sparse factors that mix rows at growing distances.

    The rows are units of h. Stage i = 0 .. m - 1 mixes, within every span of 2^(i+1) units, unit j
    with unit j + 2^i. Consecutive stages are multiplied out while they mix few rows: that saves
    passes over the matrix at next to no arithmetic.

    Args:
        split: the rows as (spans, r_p, .., r_1, h), r_k being the units that product k mixes.
        products: (axis of r_k in ``split``, matrices (rows / (r_k h), r_k h, r_k h)), in the
            order in which they act.

    Reference: Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly
    Factorization", section 4.
    """

    split: tuple[int, ...]
    products: tuple[tuple[int, Tensor], ...]

    @classmethod
    def of(cls, stages: Tensor) -> Butterfly:
        """From R_0 .. R_(m-1), (m, n, 2 h, 2 h), each acting on [unit j; unit j + 2^i]."""
        m, n, pair, _ = stages.shape
        step = max(1, int(math.log2(max(2, _WIDEST // (pair // 2)))))
        parts = [(1 << i, stages[i : i + step]) for i in range(0, m, step)]
        radices = [1 << len(part) for _, part in parts]
        split = (2 * n >> m, *reversed(radices), pair // 2)
        matrices = [_product(part, distance) for distance, part in parts]
        axes = range(len(parts), 0, -1)
        return cls(split, tuple(zip(axes, matrices, strict=True)))

    @property
    def transposed(self) -> Butterfly:
        products = ((axis, matrices.mT) for axis, matrices in reversed(self.products))
        return Butterfly(self.split, tuple(products))

    def change(self, x: Tensor) -> Tensor:
        """(M - I) x of x (rows, columns) with any strides."""
        parts = torch.split(x, self._columns(x), 1)
        return torch.cat(
            [(self._act(part) - self._units(part)).flatten(0, -2) for part in parts], 1
        )

    def apply_(self, x: Tensor) -> None:
        """x = M x in place, a few columns at a time."""
        for part in torch.split(x, self._columns(x), 1):
            self._units(part).copy_(self._act(part))

    def _columns(self, x: Tensor) -> int:
        """How many columns to take at a time; odd numbers of them are slow to multiply."""
        wanted = _BUTTERFLY_STEP if x.device.type == "cpu" else _DEVICE_STEP
        return max(96, wanted // len(x) // 32 * 32)

    def _units(self, x: Tensor) -> Tensor:
        return x.view(*self.split, x.shape[1])

    def _act(self, x: Tensor) -> Tensor:
        """M x, split into units."""
        units = self._units(x)
        for axis, matrices in self.products:
            # The order of axes that one product leaves is the next one's to change: one copy.
            moved = units.movedim(axis, -3)
            rows = moved.reshape(len(matrices), -1, x.shape[1])
            units = torch.bmm(matrices, rows).view(moved.shape).movedim(-3, axis)
        return units


def _product(stages: Tensor, distance: int) -> Tensor:
    """Consecutive stages multiplied, the first of which mixes units ``distance`` apart.

    A stage mixes two halves, u and x, of as many units l each, and all before it l with y within a
    half: M[u l, x y] = S[l][u, x] P[x][l, y], a single product of (h, h) for each pair of units.

    Returns:
        (spans * distance, r h, r h) for r = 2^stages units.
    """
    m, n, pair, _ = stages.shape
    r, h = 1 << m, pair // 2
    product = stages[0].reshape(-1, distance, 2, h, 2, h)
    for j in range(1, m):
        half = 1 << j
        stage = stages[j].reshape(-1, half, distance, 2, h, 2, h)
        before = product.reshape(-1, 2, distance, half, h, half, h)
        product = torch.einsum("gldupxq,gxdlqyk->gdulpxyk", stage, before)
    return product.reshape(2 * n // r, r * h, r * h)
