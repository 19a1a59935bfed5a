"""A delta whose rows a file stores in another order than the model."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..tensors import Op
from .base import Algorithm, Tensors
from .wrapper import Wrapper


class Ordered(Wrapper):
    """dW[p[i]] = dW'[i], dW' being the delta that ``inner`` has for W' = W[p].

    Args:
        order: p, (out,): row i of the file is row p[i] of the weight.
    """

    def __init__(self, inner: Algorithm, order: Tensor) -> None:
        super().__init__(inner)
        self.order, self.inverse = order, torch.argsort(order)

    @classmethod
    def wrap(cls, inner: Algorithm, tensors: Tensors) -> Self:
        raise NotImplementedError  # No tensor of a file asks for it.

    @property
    def reads_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.reads_weight

    def delta(self, weight: Tensor) -> Tensor:
        order, inverse = self.order.to(weight.device), self.inverse.to(weight.device)
        return self.inner.delta(weight[order])[inverse]

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        rows = 1 if op.dims else -1
        order, inverse = self.order.to(x.device), self.inverse.to(x.device)
        theirs = None if y is None else y.index_select(rows, order)
        h = self.inner.bypass(x, op, weight[order], theirs)
        return h.index_select(rows, inverse)
