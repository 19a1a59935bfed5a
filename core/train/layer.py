"""The forward pass of one frozen layer with an adapter on it, in training."""

from __future__ import annotations

from torch import Tensor

from ..adapters import Algorithm
from ..forms import Layer, Mode

__all__ = ["Layer", "Mode", "adapted"]


def adapted(algorithm: Algorithm, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
    """f'(x), differentiable with respect to the trained tensors of ``algorithm`` and x.

    ``mode``: "bypass" adds h(x) to f(x), "rebuild" gives the layer W + dW, and "auto" takes what
    costs fewer multiplications and bytes moved; it never builds W + dW in 16 bits, where small
    deltas would be rounded away, nor where W has to be unpacked for it. What differs between the
    items of a batch, as dropout does, is added to f(x) in any mode.
    """
    return algorithm.adapted(layer, x, "bypass" if algorithm.by_item else mode)
