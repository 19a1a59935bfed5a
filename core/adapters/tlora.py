"""T-LoRA: a LoRA that starts from singular vectors of the weight instead of from zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..tensors import wide
from .base import Shape, Tensors, check_product, read_scale, require
from .lora import LoRA
from .thin import Thin, product

_linalg: Any = torch.linalg  # has no types

Q, P, LAMBDA = "q_layer.weight", "p_layer.weight", "lambda_layer"
_DEPTH, _SPARE, _ROUNDS = 10, 10, 20  # Krylov blocks, columns beyond the rank, restarts


class TLoRA(Thin):
    """dW = s (P diag(l) Q - P0 diag(l0) Q0), s = alpha / r.

    P = ``p_layer`` (out, r), Q = ``q_layer`` (r, in), l = ``lambda_layer`` (1, r). P0, l0, Q0 are
    where training began and are in no file. They are taken for the r largest singular triplets
    of W, LyCORIS' default ("principal"); nothing in a file says whether training began from the
    last or middle ones or, which could not be repeated, from those of a random matrix. W must be
    the weight that the adapter was trained on: they are worked out from the weight at hand, with
    whatever was merged into it before, which changes them. Training masks the higher ranks at high
    noise; here all are active, as in LyCORIS' merging and wherever no mask is set.

    Reference: Soboleva et al. 2025, "T-LoRA: Single Image Diffusion Model Customization Without
    Overfitting", section 4.
    """

    name = "tlora"
    title = "T-LoRA"
    suffixes = (Q, P, LAMBDA)
    reads_weight = True

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        q, p, lam = require(factors, Q, P, LAMBDA)
        point = all(t[0].numel() == t.shape[1] for t in (q, p))
        fits = point and p.shape[1] == len(q) and tuple(lam.shape) == (1, len(q))
        check_product(fits, factors, P, LAMBDA, Q)
        return cls(factors, read_scale(tensors, len(q), scale))

    @property
    def rank(self) -> int:
        return len(self.tensors[Q])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensors[P]), *self.tensors[Q].shape[1:])

    @property
    def traits(self) -> tuple[str, ...]:
        return ("assumed start: the principal vectors of the weight as patched so far",)

    def mismatch(self, shape: Shape) -> str | None:
        if len(shape) < 2:
            return f"its delta is {self.shape}, the weight is {tuple(shape)}"
        if math.prod(shape[2:]) != 1:
            return f"1 x 1 factors say nothing about a kernel of {tuple(shape[2:])}"
        return super().mismatch(shape)

    def lora(self, weight: Tensor) -> LoRA:
        """[P diag(l) | -P0] [Q; diag(l0) Q0], of rank 2 r."""
        p, q = (wide(self.tensors[name], weight).flatten(1) for name in (P, Q))
        lam = wide(self.tensors[LAMBDA], weight)
        matrix = wide(weight.detach(), weight).reshape(weight.shape[:2])
        p0, lam0, q0 = principal(matrix, self.rank, q)
        up, down = torch.cat((p * lam, -p0), 1), torch.cat((q, lam0[:, None] * q0))
        return product(up, down, self.scale)


@torch.no_grad()
def principal(matrix: Tensor, rank: int, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets: U (out, r), S (r,), V^T (r, in).

    ``near``: (n, in), rows to begin with; the nearer to V^T, the faster.

    Block Krylov iteration, restarted from its own result until the residual A^T U - V S stops
    shrinking; a full decomposition where the rank is no small part of the matrix. Reproducible:
    what else it starts from are fixed random numbers.

    Reference: Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster
    Approximate Singular Value Decomposition", algorithm 2.
    """
    width = rank + _SPARE
    if 2 * width * _DEPTH > min(matrix.shape):
        return _exact(matrix, rank)
    generator = torch.Generator().manual_seed(0)
    spare = torch.randn(matrix.shape[1], _SPARE, generator=generator).to(matrix)
    basis, last = _linalg.qr(torch.cat((near.T, spare), 1))[0], math.inf
    for _ in range(_ROUNDS):
        u, s, v = _ritz(matrix, _krylov(matrix, basis))
        basis, top = v[:, :width], (u[:, :rank], s[:rank], v[:, :rank])
        rest = matrix.T @ top[0] - top[2] * top[1]
        residual = float((rest.square().sum(0).amax().sqrt() / s[0].clamp_min(1e-30)).item())
        # Down to rounding, where it no longer halves.
        if residual < 1e-4 and residual > last / 2 or residual < 1e-7:
            return top[0], top[1], top[2].T
        last = residual
    return _exact(matrix, rank)


def _krylov(matrix: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of [V, A^T A V, (A^T A)^2 V, ..], in columns."""
    basis = block
    for _ in range(_DEPTH - 1):
        block = matrix.T @ (matrix @ block)
        for _ in range(2):  # once more for what rounding left
            block = _linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = torch.cat((basis, block), 1)
    return basis


def _ritz(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of A restricted to a subspace: U, S, V."""
    q, r = _linalg.qr(matrix @ basis)
    u, s, vh = _linalg.svd(r)
    return q @ u, s, basis @ vh.T


def _exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a full decomposition; past the smaller side there is nothing more."""
    u, s, vh = _linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
