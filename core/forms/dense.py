"""D itself."""

from __future__ import annotations

from torch import Tensor

from .base import TOUCH, Form, Grads


class Dense(Form):
    """D (out, in)."""

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.tensors[0].shape
        return out, width

    def into(self, x: Tensor, y: Tensor) -> None:
        y.addmm_(x, self.tensors[0].T)

    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        if gx is not None:
            gx.addmm_(g, self.tensors[0])
        return (g.T @ x,)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.tensors[0]

    def cost(self, tokens: int) -> tuple[float, float]:
        size = self.tensors[0].numel()
        return 3.0 * tokens * size, (tokens + 6.0 * TOUCH) * size
