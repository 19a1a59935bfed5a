"""D = W1 (x) W2, its second factor full or low-rank."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TOUCH, Form, Grads


class Kronecker(Form):
    """D = W1 (x) W2: W1 (a, b), W2 (c, d). With x as rows X (b, d), h(x) is W1 X W2^T (a, c)."""

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = (t.shape for t in self.tensors)
        return a * c, b * d

    @property
    def second_first(self) -> bool:
        """Whether X W2^T, then W1 takes fewer multiplications than W1 X, then W2^T."""
        (a, b), (c, d) = (t.shape for t in self.tensors)
        return b * c * (d + a) <= a * d * (b + c)

    def into(self, x: Tensor, y: Tensor) -> None:
        (w1, w2), (rows, out) = self.tensors, self._rows(x, y)
        if self.second_first:
            _left_(out, w1, rows @ w2.T)
        else:
            middle = _left(w1, rows)
            out.view(-1, len(w2)).addmm_(middle.view(-1, w2.shape[1]), w2.T)

    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        (w1, w2), (rows, out) = self.tensors, self._rows(x, g)
        (c, d) = w2.shape
        if self.second_first:
            back = _left(w1.T, out).view(-1, c)
            if gx is not None:
                gx.view(-1, d).addmm_(back, w2)
            return _outer(out, rows @ w2.T), back.T @ rows.reshape(-1, d)
        middle, back = _left(w1, rows), out @ w2
        if gx is not None:
            _left_(gx.view(rows.shape), w1.T, back)
        return _outer(back, rows), out.reshape(-1, c).T @ middle.view(-1, d)

    def merged(self, weight: Tensor) -> Tensor:
        (w1, w2) = self.tensors
        (a, b), (c, d) = w1.shape, w2.shape
        rows = weight.reshape(a, c, b, d)
        merged = torch.addcmul(rows, w1[:, None, :, None], w2[:, None])
        return merged.reshape(weight.shape)

    def cost(self, tokens: int) -> tuple[float, float]:
        (a, b), (c, d) = (t.shape for t in self.tensors)
        pair = min(b * c * (d + a), a * d * (b + c))
        touched = tokens * (a * c + b * d) * TOUCH
        merge = 3 * a * b * c * d * TOUCH
        return 3.5 * tokens * pair + touched, 2 * tokens * pair + 2 * merge

    def _rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x as (tokens, b, d) and y as (tokens, a, c)."""
        (a, b), (c, d) = (t.shape for t in self.tensors)
        return x.view(-1, b, d), y.view(-1, a, c)


class NarrowKronecker(Form):
    """D = W1 (x) B A: W1 (a, b), B (c, r), A (r, d); W1 acts between the two, on r columns."""

    @property
    def shape(self) -> tuple[int, int]:
        w1, left, right = self.tensors
        return len(w1) * len(left), w1.shape[1] * right.shape[1]

    def into(self, x: Tensor, y: Tensor) -> None:
        w1, left, right = self.tensors
        narrow = _left(w1, self._rows(x) @ right.T)
        y.view(-1, len(left)).addmm_(narrow.view(-1, left.shape[1]), left.T)

    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        w1, left, right = self.tensors
        rows, out = self._rows(x), g.reshape(-1, len(left))
        before = rows @ right.T
        after = _left(w1, before).view(-1, left.shape[1])
        g_after = (out @ left).view(-1, len(w1), left.shape[1])
        g_before = _left(w1.T, g_after).view(-1, left.shape[1])
        if gx is not None:
            gx.view(-1, right.shape[1]).addmm_(g_before, right)
        g_right = g_before.T @ rows.reshape(-1, right.shape[1])
        return _outer(g_after, before), (after.T @ out).T, g_right

    def merged(self, weight: Tensor) -> Tensor:
        w1, left, right = self.tensors
        return Kronecker(w1, left @ right).merged(weight)

    def cost(self, tokens: int) -> tuple[float, float]:
        w1, left, right = self.tensors
        (a, b), (c, r), d = w1.shape, left.shape, right.shape[1]
        narrow = r * (b * d + a * b + a * c)
        touched = tokens * (a * c + b * d) * TOUCH
        return 5 * tokens * narrow + touched, 4 * tokens * narrow + 6 * a * b * c * d * TOUCH

    def _rows(self, x: Tensor) -> Tensor:
        return x.view(-1, self.tensors[0].shape[1], self.tensors[2].shape[1])


def _left(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix rows[t] for every t, (t, n, m)."""
    return torch.bmm(matrix.expand(len(rows), *matrix.shape), rows)


def _left_(out: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """out[t] += matrix rows[t] in place."""
    out.baddbmm_(matrix.expand(len(rows), *matrix.shape), rows)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over t of left[t] right[t]^T."""
    return torch.bmm(left, right.mT).sum(0)
