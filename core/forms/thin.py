"""D = B A, two thin matrices."""

from __future__ import annotations

from torch import Tensor

from .base import TOUCH, Form, Grads


class Thin(Form):
    """D = B A: B (out, r), A (r, in). Keeps A x, of r channels."""

    keeps = True

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tensors[0]), self.tensors[1].shape[1]

    def into(self, x: Tensor, y: Tensor) -> Tensor:
        up, down = self.tensors
        h = x @ down.T
        y.addmm_(h, up.T)
        return h

    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        up, down = self.tensors
        h = x @ down.T if kept is None else kept
        gh = g @ up
        if gx is not None:
            gx.addmm_(gh, down)
        # The wide matrix on the right is multiplied faster than transposed on the left.
        return (h.T @ g).T, gh.T @ x

    def merged(self, weight: Tensor) -> Tensor:
        return weight.addmm(*self.tensors)

    def cost(self, tokens: int) -> tuple[float, float]:
        (out, width), rank = self.shape, len(self.tensors[1])
        bypass = 5 * tokens * rank * (out + width)
        merge = out * width * (rank + 2 * TOUCH)
        return bypass, 3 * tokens * rank * (out + width) + 2 * merge
