"""A delta whose rows a file stores in another order than the model."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..tensors import Op
from .base import Algorithm, Shape
from .wrapper import Wrapper


class Ordered(Wrapper):
    """dW[p[i]] = dW'[i], dW' being the delta that ``inner`` has for W' = W[p].

    Args:
        order: p, (out,): row i of the file is row p[i] of the weight.
    """

    def __init__(self, inner: Algorithm, order: Tensor) -> None:
        super().__init__(inner)
        self.order, self.inverse = order, torch.argsort(order)

    def mismatch(self, shape: Shape) -> str | None:
        if not shape or shape[0] != len(self.order):
            return f"it is in an order of {len(self.order)} rows, the weight is {tuple(shape)}"
        return super().mismatch(shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(self._theirs(weight))[self.inverse.to(weight.device)]

    def merge(self, weight: Tensor) -> Tensor:
        """By the merging of ``inner``, as exact as that is."""
        order = self.order.to(weight.device)
        merged = self.inner.merge(weight[order])
        if merged.shape != weight.shape:  # of one that enlarges the weight
            return merged[self.inverse.to(weight.device)]
        weight[order] = merged
        return weight

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        if op.groups > 1:  # the order mixes the groups, each of which sees its own x
            return super().bypass(x, op, weight, y)
        rows = 1 if op.dims else -1
        order, inverse = self.order.to(x.device), self.inverse.to(x.device)
        theirs = None if y is None else y.index_select(rows, order)
        h = self.inner.bypass(x, op, self._theirs(weight), theirs)
        return h.index_select(rows, inverse)

    def settled(self, weight: Tensor) -> Self:
        return self._around(self.inner.settled(self._theirs(weight)))

    def _theirs(self, weight: Tensor) -> Tensor:
        """W' where its values matter. Of most algorithms only the shape counts, and a copy costs
        a matrix a call."""
        return weight[self.order.to(weight.device)] if self.inner.reads_weight else weight
