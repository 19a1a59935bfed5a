"""OFT as peft has it: the input is rotated, by default through a short series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import Blocks, cayley, exact, eye, neumann
from .base import AdapterConfig, Shape, Tensors
from .rotation import Rotation, check_blocks

ROTATION, DIAG = "oft_R.weight", "oft_R.diag"
_TERMS = 5


class PeftOFT(Rotation):
    """W' = W diag(R_1, R_2, ..)^T on the columns, (in * prod(k)); x becomes x R.

    ``oft_R.weight`` (n, b (b - 1) / 2) holds the triangles above the diagonals of skew-symmetric
    Q (b, b), row by row; n = 1 is shared by all blocks of columns. R is the series of
    :func:`~core.orthogonal.neumann`, or where peft's config says so its exact counterpart, which
    peft has the other way round: R = (I - Q)(I + Q)^-1. With ``coft`` each ||Q_i||_F is brought
    down to eps / sqrt(n). ``oft_R.diag`` (n, b, b) is R itself.
    For k x k convolutions this is what peft merges; its forward sums overlapping patches, which no
    weight can do.

    Args:
        terms: of the series, 0 for the exact transform. eps: COFT's, 0 for none.

    Reference: Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", section 4; peft 0.21.2.
    """

    name = "oft_peft"
    title = "OFT (peft)"
    untrained = "Diag-OFT trains such rotations in files that tell their settings by themselves"
    suffixes = (ROTATION, DIAG)
    on_input = True
    finished_name = DIAG

    def __init__(self, tensors: Tensors, terms: int = _TERMS, eps: float = 0.0) -> None:
        super().__init__(tensors)
        self.terms, self.eps = terms, eps

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if len(factors) > 1:
            raise AdapterLabError("The rotation is given twice", found=", ".join(factors))
        if DIAG in factors:
            check_blocks(cls.title, factors[DIAG], 3)
        elif factors and _block(factors[ROTATION]) is None:
            found = f"{tuple(factors[ROTATION].shape)}"
            raise AdapterLabError(f"{ROTATION} holds no triangles", found=found)
        return cls(factors) if factors else None

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Q zero; b is the divisor of the columns next to the rank, 2 at least."""
        columns = math.prod(shape[1:])
        divisors = [b for b in range(2, columns + 1) if columns % b == 0] or [columns]
        b = min(divisors, key=lambda b: (abs(b - config.rank), b))
        size = (columns // b, b * (b - 1) // 2)
        return cls({ROTATION: torch.zeros(size, device=generator.device, dtype=torch.float32)})

    def configured(self, config: Mapping[str, Any]) -> Self:
        """Under peft's ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``coft``, ``eps``.

        Raises:
            AdapterLabError: they are not numbers in range.
        """
        if DIAG in self.tensors:
            return self
        other, series = copy(self), config.get("use_cayley_neumann", True)
        other.terms = int(_setting(config, "num_cayley_neumann_terms", _TERMS)) if series else 0
        other.eps = _setting(config, "eps", 6e-5) if config.get("coft") else 0.0
        return other

    @property
    def rank(self) -> int:
        return self.tensors[DIAG].shape[-1] if DIAG in self.tensors else self._b

    @property
    def size(self) -> int:
        return len(next(iter(self.tensors.values()))) * self.rank

    @property
    def traits(self) -> tuple[str, ...]:
        return ("COFT",) if self.eps else ()

    @property
    def told(self) -> bool:
        return (
            DIAG in self.tensors
            and self.scale == 1
            or (super().told and self.terms == _TERMS and not self.eps)
        )

    def covers(self, size: int) -> bool:
        shared = self.size == self.rank and size % self.rank == 0
        return shared or super().covers(size)

    def changes(self, like: Tensor) -> list[Tensor]:
        if DIAG in self.tensors:
            rotation = exact(self.tensors[DIAG], like)
            return [rotation - eye(rotation)]
        q = self._skew(like)
        return [neumann(q, self.terms) if self.terms else cayley(-q)]

    def turn(self, changes: list[Tensor], size: int) -> Blocks:
        return Blocks((changes[0].expand(size // self.rank, -1, -1),))

    @property
    def _b(self) -> int:
        return _block(self.tensors[ROTATION]) or 0

    def _skew(self, like: Tensor) -> Tensor:
        triangles, b = exact(self.tensors[ROTATION], like), self._b
        upper = triangles.new_zeros(len(triangles), b, b)
        rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
        upper[:, rows, columns] = triangles
        q = upper - upper.mT
        if not self.eps:
            return q
        norm = q.square().sum((1, 2), keepdim=True).sqrt()
        limit = self.eps / math.sqrt(len(q))
        return torch.where(norm > limit, q * limit / norm, q)


def _setting(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number above 0, a whole one if ``default`` is; raises AdapterLabError for anything else."""
    value: Any = config.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value < math.inf and (isinstance(default, float) or value == int(value)):
        return value
    failed = f"'{name}' in adapter_config.json is not usable"
    raise AdapterLabError(failed, found=repr(value))


def _block(triangles: Tensor) -> int | None:
    """b of (n, b (b - 1) / 2); None where there is none."""
    count = triangles.shape[-1]
    b = (1 + math.isqrt(1 + 8 * count)) // 2
    return b if triangles.ndim == 2 and b * (b - 1) // 2 == count else None
