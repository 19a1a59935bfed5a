"""T-LoRA: a LoRA that starts from singular vectors of the weight instead of from zero."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import wide
from .base import AdapterConfig, Shape, Tensors
from .draw import Draw
from .lora import LoRA
from .ranks import Ranks
from .reading import check_product, read_scale, require
from .thin import Thin, product

_linalg: Any = torch.linalg  # has no types

Q, P, LAMBDA = "q_layer.weight", "p_layer.weight", "lambda_layer"
START = tuple(f"{name}.start" for name in (Q, P, LAMBDA))
_DEPTH, _SPARE, _ROUNDS = 10, 10, 20  # Krylov blocks, columns beyond the rank, restarts


class TLoRA(Thin):
    """dW = s (P diag(l) Q - P0 diag(l0) Q0), s = alpha / r.

    P = ``p_layer`` (out, r), Q = ``q_layer`` (r, in), l = ``lambda_layer`` (1, r). P0, l0, Q0 are
    where training began and are in no file. They are taken for the r largest singular triplets
    of W, LyCORIS' default ("principal"); nothing in a file says whether training began from the
    last or middle ones or, which could not be repeated, from those of a random matrix. W must be
    the weight that the adapter was trained on: they are worked out from the weight at hand, with
    whatever was merged into it before, which changes them. Training masks the higher ranks at high
    noise; elsewhere all are active, as in LyCORIS' merging and wherever no mask is set.

    In training the start is kept beside the factors, in ``START``, zeros until :meth:`started`. The
    delta is computed as (P diag(l) - P0 diag(l0)) Q + P0 diag(l0) (Q - Q0): of the factors that it
    begins with both terms are exactly zero. All of it is kept in float32, whatever is rounded would
    be taken for a change.

    Reference: Soboleva et al. 2025, "T-LoRA: Single Image Diffusion Model Customization Without
    Overfitting", section 4.
    """

    name = "tlora"
    title = "T-LoRA"
    trainable = True
    purpose = "fewer ranks the more noise there is, against memorising a few pictures"
    suffixes = (Q, P, LAMBDA)
    frozen = START
    precise = (Q, P, LAMBDA, *START)

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

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Zeros, in the place of the vectors that :meth:`started` takes from the weight.

        The rank is at most the smaller side of the weight, which has no more vectors.
        """
        out, width, *k = shape
        r = min(config.rank, out, width)
        made = cls({}, config.scale)
        sizes = ((r, width, *(1 for _ in k)), (out, r, *(1 for _ in k)), (1, r))
        for name, size in zip((Q, P, LAMBDA, *START), (*sizes, *sizes), strict=True):
            made.tensors[name] = torch.zeros(size, device=generator.device, dtype=torch.float32)
        misfit = made.misfit(shape)
        if misfit:
            raise AdapterLabError(
                "T-LoRA cannot be trained on this layer", found=misfit,
                fix="Leave convolutions out, or choose another algorithm",
            )  # fmt: skip
        return made

    def unstarted(self) -> Self:
        """One that was read, as :meth:`started` and a snapshot of its training expect it."""
        zeros = {f"{n}.start": torch.zeros_like(self.tensors[n]) for n in (Q, P, LAMBDA)}
        return self.on({**self.tensors, **zeros})

    @property
    def reads_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return START[0] not in self.tensors

    @property
    def needs_weight_to_start(self) -> bool:
        return True

    @torch.no_grad()
    def started(self, weight: Tensor) -> Self:
        """With the principal vectors of W as the start, and as the factors of a fresh one."""
        kept = [self.tensors[name] for name in START if name in self.tensors]
        if any(t.any() for t in kept):
            return self
        q = self.tensors[Q]
        near = q.flatten(1) if q.any() else torch.randn(*q.shape[:2], generator=_generator())
        q0, p0, lam0 = self._found(weight, near)
        found = {Q: q0.reshape(q.shape), P: p0.reshape(self.tensors[P].shape), LAMBDA: lam0[None]}
        found = {name: t.to(q.device, torch.float32) for name, t in found.items()}
        start = {f"{name}.start": t.clone() for name, t in found.items()}
        return self.on({**self.tensors, **({} if q.any() else found), **start})

    @property
    def draws(self) -> bool:
        return START[0] in self.tensors

    def drawn(self, draw: Draw) -> Ranks:
        """The first r(t) ranks of each item, r(t) = floor((1 - t) (r - 1)) + 1.

        Reference: section 4 of the paper; the lowest rank of 1 is that of LyCORIS.
        """
        active = ((1 - draw.t.double().cpu()) * (self.rank - 1)).floor() + 1
        mask = torch.arange(self.rank) < active[:, None]
        return Ranks(self._product(*self._begun()), mask.float())

    def state(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().state().items() if name not in START}

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
        """[P diag(l) - P0 diag(l0) | P0 diag(l0)] [Q; Q - Q0], of rank 2 r."""
        if START[0] in self.tensors:
            return self._product(*self._begun(), weight)
        return self._product(*self._found(weight, self.tensors[Q].flatten(1)), weight)

    def _found(self, weight: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q0, P0 and l0 of ``weight``; zeros past the smaller side, which has no more vectors."""
        matrix = wide(weight.detach(), weight).reshape(weight.shape[:2])
        p0, lam0, q0 = principal(matrix, self.rank, near.to(matrix))
        spare = self.rank - len(lam0)
        return F.pad(q0, (0, 0, 0, spare)), F.pad(p0, (0, spare)), F.pad(lam0, (0, spare))

    def _begun(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q0, P0 and l0 as they were kept."""
        q0, p0, lam0 = (self.tensors[name].flatten(1) for name in START)
        return q0, p0, lam0

    def _product(self, q0: Tensor, p0: Tensor, lam0: Tensor, like: Tensor | None = None) -> LoRA:
        like = q0 if like is None else like
        q, p, lam = (wide(self.tensors[name], like).flatten(1) for name in (Q, P, LAMBDA))
        began = wide(p0, like) * wide(lam0, like)
        up = torch.cat((p * lam - began, began), 1)
        return product(up, torch.cat((q, q - wide(q0, like))), self.scale)


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
    spare = torch.randn(matrix.shape[1], _SPARE, generator=_generator()).to(matrix)
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


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
