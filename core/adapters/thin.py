"""Algorithms whose delta on a given weight is a product of two thin matrices."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..tensors import Op
from .base import Algorithm
from .lora import DOWN, UP, LoRA


class Thin(Algorithm):
    """dW = s B A with B and A that take the weight to know, be it only its width."""

    @abstractmethod
    def lora(self, weight: Tensor) -> LoRA:
        """The LoRA that it is on ``weight``, wherever that costs more than using it: once."""

    def settled(self, weight: Tensor) -> LoRA:
        return self.lora(weight)

    def delta(self, weight: Tensor) -> Tensor:
        return self.lora(weight).delta(weight)

    def merge(self, weight: Tensor) -> Tensor:
        return self.lora(weight).merge(weight)

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        return self.lora(weight).bypass(x, op, weight, y)


def product(up: Tensor, down: Tensor, scale: float) -> LoRA:
    """s B A from (out, r) and (r, in)."""
    return LoRA({UP: up, DOWN: down}, scale)
