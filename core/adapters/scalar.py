"""A learned factor of a delta."""

from __future__ import annotations

from torch import Tensor

from ..tensors import wide
from .base import Algorithm
from .draw import Draw
from .wrapper import Acting

SCALAR = "scalar"  # in old files of LyCORIS it is beside the factors


class Scalar(Acting):
    """dW = c dW', c being ``scalar`` () and dW' the delta of ``inner``.

    It starts at 0 and ``inner`` with no factor of zeros, so that all of them learn from the second
    step on. c is multiplied into the factors that carry it wherever the delta is wanted, and so it
    is in a file.

    Reference: LyCORIS, ``use_scalar``.
    """

    @property
    def acting(self) -> Algorithm:
        """``inner`` with c in its factors."""
        c, tensors = self.tensors[SCALAR], self.inner.tensors
        carried = {n: (wide(t, t) * c).to(t) for n, t in tensors.items() if n in self.folds}
        return self.inner.on({**tensors, **carried})

    def drawn(self, draw: Draw) -> Algorithm | None:
        return self.acting.drawn(draw)

    def state(self) -> dict[str, Tensor]:
        return self.acting.state()
