"""Diag-OFT: blocks of output rows, each rotated, and optionally every row rescaled."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, Butterfly, cayley, exact, eye, shrunk, skew
from ..tensors import factorization
from .base import AdapterConfig, Shape, Tensors, read_number
from .rotation import Rotation, check_blocks

BLOCKS, DIAG, RESCALE = "oft_blocks", "oft_diag", "rescale"


class OFT(Rotation):
    """W'_k = R_k^T W_k on rows k b .. k b + b, times ``rescale`` (out, 1, ..).

    Q = B - B^T of ``oft_blocks`` B (n, b, b), R = (I + Q)(I - Q)^-1. An ``alpha`` > 0 is the
    constraint of COFT: ||Q||_F over all blocks is brought down to alpha * out. ``oft_diag``
    (n, b, b), of early LyCORIS files, is R itself. Strength m: R becomes m R + (1 - m) I, and
    ``rescale`` 1 + m (rescale - 1).

    Reference: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    sections 3.2 and 3.3; LyCORIS, whose einsum applies R transposed.
    """

    name = "oft"
    title = "Diag-OFT"
    suffixes = (BLOCKS, DIAG, RESCALE)
    finished_name = DIAG
    gains_name = RESCALE

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=1)
        names = [name for name in (BLOCKS, DIAG) if name in factors]
        if factors and len(names) != 1:
            expected = f"one of {BLOCKS} and {DIAG}"
            raise AdapterLabError("Which rotation?", found=", ".join(factors), expected=expected)
        if not factors or factors[names[0]].ndim == 4:  # of a butterfly
            return None
        check_blocks(cls.title, factors[names[0]], 3)
        return cls(factors, constraint=read_constraint(tensors))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """B zero; b is the smaller of what ``factorization(out, rank)`` gives, as in LyCORIS."""
        b, n = factorization(shape[0], config.rank)
        return cls({BLOCKS: torch.zeros(n, b, b, device=generator.device, dtype=torch.float32)})

    @property
    def rank(self) -> int:
        return self._blocks.shape[-1]

    @property
    def size(self) -> int:
        return len(self._blocks) * self.rank

    @property
    def traits(self) -> tuple[str, ...]:
        traits = ["COFT"] if BLOCKS in self.tensors and self.constraint > 0 else []
        return (*traits, *(name for name in (RESCALE,) if name in self.tensors))

    def changes(self, like: Tensor) -> list[Tensor]:
        if DIAG in self.tensors:
            rotation = exact(self.tensors[DIAG], like)
            return [rotation - eye(rotation)]
        q, limit = skew(exact(self.tensors[BLOCKS], like)), self.constraint * self.size
        return [cayley(shrunk(q, limit) if limit > 0 else q)]

    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        return Blocks((changes[0].mT,))

    @property
    def _blocks(self) -> Tensor:
        return self.tensors[BLOCKS if BLOCKS in self.tensors else DIAG]


def read_constraint(tensors: Tensors) -> float:
    """alpha of an OFT file, 0 (none) where it has none."""
    return read_number(tensors, "alpha", 0.0)
