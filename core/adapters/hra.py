"""HRA: the input reflected at a few hyperplanes, one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..orthogonal import exact, reflections
from ..tensors import Op, low_rank, wide
from .base import Algorithm, Shape, Tensors
from .lora import DOWN, UP, LoRA
from .reading import read_number, require

VECTORS, STRENGTH = "hra_u", "hra_strength"


class HRA(Algorithm):
    """W' = W H_1 H_2 .. H_r with H_i = I - 2 u_i u_i^T / ||u_i||^2, on the columns of W.

    ``hra_u`` (in * prod(k), r). The product is I - U T U^T with an upper triangular T, so that
    dW = -(W U T) U^T has rank r. With peft's ``apply_GS`` the u_i are made orthonormal first and
    T = 2 I. Strength m: W + m dW, as H is no rotation that could be interpolated (an even number
    of reflections starts as I without any of them being it). ``hra_strength`` holds it in a file.
    The bias is left as it is.

    Args:
        orthogonal: apply_GS.

    Reference: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via
    Householder Reflection Adaptation", section 3; T: Schreiber and Van Loan 1989, "A
    Storage-Efficient WY Representation", section 2; peft 0.21.2.
    """

    name = "hra"
    title = "HRA"
    untrained = "it starts from pairs of reflections that undo each other only up to rounding"
    suffixes = (VECTORS, STRENGTH)
    scaled = False
    reads_weight = True

    def __init__(self, tensors: Tensors, scale: float = 1.0, orthogonal: bool = False) -> None:
        super().__init__(tensors, scale)
        self.orthogonal = orthogonal

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=0)
        if not factors:
            return None
        (vectors,) = require(factors, VECTORS)
        if vectors.ndim != 2:
            found = f"a tensor of shape {tuple(vectors.shape)}"
            raise AdapterLabError(f"{VECTORS} is not a matrix", found=found)
        return cls({VECTORS: vectors}, read_number(factors, STRENGTH, 1.0))

    def configured(self, config: Mapping[str, Any]) -> Self:
        """Under peft's ``apply_GS``."""
        other = copy(self)
        other.orthogonal = bool(config.get("apply_GS"))
        return other

    @property
    def rank(self) -> int:
        return self.tensors[VECTORS].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The one axis that the file tells."""
        return (len(self.tensors[VECTORS]),)

    @property
    def alpha(self) -> float:
        return 0.0

    def mismatch(self, shape: Shape) -> str | None:
        (columns,) = self.shape
        if len(shape) < 2 or math.prod(shape[1:]) != columns:
            return f"it reflects {columns} columns, the weight is {tuple(shape)}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self._factors(wide(weight, weight))
        return (up @ down).reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        if not self.scale:
            return weight
        up, down = self._factors(weight)
        if weight.ndim == 2:
            return weight.addmm_(up, down)
        return weight.add_((up @ down).view(weight.shape))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """-(W U T) (U^T x), as a LoRA."""
        up, down = self._factors(wide(weight, x))
        down = down.reshape(self.rank, *weight.shape[1:])
        return low_rank(x, op, up.to(x.dtype), down.to(x.dtype))

    def settled(self, weight: Tensor) -> Algorithm:
        """The LoRA that it is on this weight."""
        up, down = self._factors(wide(weight, weight))
        unit = (1,) * (weight.ndim - 2)
        return LoRA({UP: up.view(*up.shape, *unit), DOWN: down.view(-1, *weight.shape[1:])})

    def state(self) -> dict[str, Tensor]:
        """Orthonormal vectors say the same without the setting that made them so."""
        state = dict(self.tensors)
        if self.orthogonal:
            vectors = state[VECTORS]
            u, _ = reflections(exact(vectors, vectors), True)
            state[VECTORS] = u.to(vectors.device, torch.float32)
        if self.scale != 1:
            state[STRENGTH] = torch.tensor(self.scale)
        return state

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """-m W U T (out, r) and U^T (r, in * prod(k)), like ``weight``."""
        u, turned = reflections(exact(self.tensors[VECTORS], weight), self.orthogonal)
        flat = weight.reshape(len(weight), -1)
        return flat @ (turned * -self.scale).to(weight), u.T.to(weight)
