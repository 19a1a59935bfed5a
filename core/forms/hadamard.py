"""D = (B1 A1) o (B2 A2), by blocks of rows or as one product of rank r^2."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..tensors import khatri_rao
from .base import TOUCH, Form, Grads

# Elements of a block of rows, several of which a core's cache holds; other devices take all rows.
_BLOCK = 1 << 16


class Hadamard(Form):
    """D = (B1 A1) o (B2 A2): B1 (out, r), A1 (r, in), B2 (out, s), A2 (s, in).

    It is also K L^T with the row-wise Kronecker products K of the Bi, (out, r s), and L of the
    Ai^T, (in, r s): that is the bypass where it takes fewer multiplications than the dense D.
    """

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tensors[0]), self.tensors[1].shape[1]

    @property
    def wide(self) -> int:
        """Rank of K L^T."""
        return len(self.tensors[1]) * len(self.tensors[3])

    def into(self, x: Tensor, y: Tensor) -> None:
        if self._narrow(len(x))[0] <= self._dense(len(x))[0] + len(x) * math.prod(self.shape):
            left, right = self._product()
            y.addmm_(x @ right, left.T)
        else:
            y.addmm_(x, self.merged(None).T)

    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        beside = 0 if gx is None else len(x) * math.prod(self.shape)
        if self._narrow(len(x))[1] > self._dense(len(x))[1] + beside:
            dense, grads = self._dense_grads(x, g, None, keep=gx is not None)
            if gx is not None and dense is not None:
                gx.addmm_(g, dense)
            return grads
        b1, a1, b2, a2 = self.tensors
        left, right = self._product()
        gh = g @ left
        if gx is not None:
            gx.addmm_(gh, right.T)
        g_left = ((x @ right).T @ g).T.reshape(len(b1), b1.shape[1], -1)
        g_right = (gh.T @ x).reshape(len(a1), len(a2), -1)
        return (
            (g_left @ b2[:, :, None])[..., 0], (g_right * a2).sum(1),
            (b1[:, None] @ g_left)[:, 0], (g_right * a1[:, None]).sum(0),
        )  # fmt: skip

    def rebuilt_grads(self, x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Grads]:
        if self._narrow(len(x))[1] <= self._dense(len(x))[1]:
            gx = g @ weight
            return gx, self.grads(x, g, gx, None)
        merged, grads = self._dense_grads(x, g, weight, keep=True)
        assert merged is not None
        return g @ merged, grads

    def merged(self, weight: Tensor | None) -> Tensor:
        """W + D, D alone without a weight."""
        merged = self.tensors[0].new_empty(self.shape)
        for rows in self._blocks():
            first, second = self._halves(rows)
            if weight is None:
                torch.mul(first, second, out=merged[rows])
            else:
                torch.addcmul(weight[rows], first, second, out=merged[rows])
        return merged

    def cost(self, tokens: int) -> tuple[float, float]:
        narrow, dense = self._narrow(tokens), self._dense(tokens)
        beside = tokens * math.prod(self.shape)
        bypass = min(narrow[0], dense[0] + beside) + min(narrow[1], dense[1] + beside)
        return bypass, dense[0] + min(narrow[1], dense[1])

    def _narrow(self, tokens: int) -> tuple[float, float]:
        """Multiplications of K L^T, forward and backward."""
        (out, width), wide = self.shape, self.wide
        make = 2 * TOUCH * wide * (out + width)
        ahead = tokens * wide * (out + width) + make
        return ahead, tokens * wide * (2 * out + 3 * width) + 3 * make

    def _dense(self, tokens: int) -> tuple[float, float]:
        """Of W + D, forward and backward, beyond those of W; thin products take twice as long."""
        (out, width), ranks = self.shape, len(self.tensors[1]) + len(self.tensors[3])
        ahead = out * width * (2 * ranks + 2 * TOUCH)
        return ahead, out * width * (tokens + 6 * ranks + 4 * TOUCH)

    def _product(self) -> tuple[Tensor, Tensor]:
        """K (out, r s) and L (in, r s)."""
        b1, a1, b2, a2 = self.tensors
        return khatri_rao(b1, b2), (a1[:, None] * a2).flatten(0, 1).T

    def _halves(self, rows: slice) -> tuple[Tensor, Tensor]:
        b1, a1, b2, a2 = self.tensors
        return b1[rows] @ a1, b2[rows] @ a2

    def _blocks(self) -> Iterator[slice]:
        out, width = self.shape
        cpu = self.tensors[0].device.type == "cpu"
        height = max(16, _BLOCK * torch.get_num_threads() // width // 16 * 16) if cpu else out
        return (slice(start, start + height) for start in range(0, out, height))

    def _dense_grads(
        self, x: Tensor, g: Tensor, weight: Tensor | None, *, keep: bool
    ) -> tuple[Tensor | None, Grads]:
        """W + D if it is to be kept, and the gradients; by blocks of rows of both."""
        b1, a1, b2, a2 = self.tensors
        dense = g.T @ x
        merged = b1.new_empty(self.shape) if keep else None
        grads = tuple(torch.zeros_like(t) for t in self.tensors)
        for rows in self._blocks():
            first, second = self._halves(rows)
            if merged is not None and weight is not None:
                torch.addcmul(weight[rows], first, second, out=merged[rows])
            elif merged is not None:
                torch.mul(first, second, out=merged[rows])
            # The gradients of the two halves, in the place of their values.
            first, second = second.mul_(dense[rows]), first.mul_(dense[rows])
            torch.mm(first, a1.T, out=grads[0][rows])
            torch.mm(second, a2.T, out=grads[2][rows])
            grads[1].addmm_(b1[rows].T, first)
            grads[3].addmm_(b2[rows].T, second)
        return merged, grads
