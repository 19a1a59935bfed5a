"""Dense differences, of weights and of biases, and whole weights."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Dense
from ..tensors import scaled, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors


class Full(Algorithm):
    """dW = ``diff``, of the shape of the weight: (out, in, *k), or (n,) for a norm."""

    name = "full"
    title = "Full"
    trainable = True
    purpose = "every number of the weight, for fine-tuning; files as large as the model"
    suffixes = ("diff",)
    scaled = False

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=0)
        if len(factors) > 1:
            raise AdapterLabError(f"A {cls.title} tensor is given twice", found=", ".join(factors))
        return cls(factors) if factors else None

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Zero."""
        return cls({cls.suffixes[0]: torch.zeros(*shape, device=generator.device)})

    @property
    def rank(self) -> int:
        return min(self._tensor.flatten(1).shape) if self._tensor.ndim > 1 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self._like(weight) * self.scale

    def merge(self, weight: Tensor) -> Tensor:
        return weight.add_(self._like(weight), alpha=self.scale)

    def form(self, like: Tensor) -> Dense | None:
        matrix = self._tensor.to(like.device)
        return Dense(matrix, scale=self.scale) if matrix.ndim == 2 else None

    def state(self) -> dict[str, Tensor]:
        return {name: scaled(t, self.scale) for name, t in self.tensors.items()}

    def _like(self, weight: Tensor) -> Tensor:
        return wide(self._tensor, weight).reshape(weight.shape)

    @property
    def _tensor(self) -> Tensor:
        return next(iter(self.tensors.values()))


class Bias(Full):
    """The same for the bias of a layer or norm, (out,)."""

    name = "bias"
    title = "Bias"
    trainable = False
    untrained = "it is trained beside the weight, by the option 'bias'"
    suffixes = ("diff_b", "b_norm")
    parameter = "bias"


class Replaced(Full):
    """dW = s (``set_weight`` - W): another weight in the place of W, at strength m a blend of both.

    The host's own loader puts it in whole at any strength.
    """

    name = "set"
    title = "Replaced weight"
    trainable = False
    untrained = "the same is trained as a difference, by Full"
    additive = False
    suffixes = ("set_weight",)
    reads_weight = True

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        raise AdapterLabError(f"{cls.title} is read, not trained", found=cls.untrained)

    def delta(self, weight: Tensor) -> Tensor:
        return (self._like(weight) - weight).mul_(self.scale)

    def form(self, like: Tensor) -> None:
        return None

    def merge(self, weight: Tensor) -> Tensor:
        new = self._like(weight)
        return weight.copy_(new) if self.scale == 1 else weight.lerp_(new.to(weight), self.scale)

    def state(self) -> dict[str, Tensor]:
        if self.scale != 1:
            raise AdapterLabError("A replaced weight has no strength that a file could hold")
        return dict(self.tensors)
