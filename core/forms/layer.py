"""What the training pass of an adapter has to know of the frozen layer."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from ..tensors import Op

Mode = Literal["auto", "bypass", "rebuild"]


class Layer(Protocol):
    """One layer of the frozen model; the host supplies it.

    Attributes:
        op: the layer without its weight and bias.
        bias: as it acts, on the device of the input.
        plain: whether :meth:`weight` is the tensor in memory, so that asking again costs nothing.
    """

    @property
    def op(self) -> Op: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def plain(self) -> bool: ...

    def base(self, x: Tensor) -> Tensor:
        """f(x) by the layer's own forward, bias included, in memory of its own."""
        ...

    def weight(self) -> Tensor:
        """W (out, in, *k) as it acts, on the device of the input."""
        ...


def unbiased(y: Tensor, layer: Layer) -> Tensor:
    """f(x) without the bias of the layer; y itself where it has none."""
    return y if layer.bias is None else y - channels(layer.bias, layer.op).to(y.dtype)


def owned(y: Tensor) -> Tensor:
    """``y`` in the same memory as no view: models add in place to what layers give, which autograd
    forbids for views that were made inside of a function of its own."""
    return y.data


def channels(vector: Tensor, op: Op) -> Tensor:
    """(n,) as a factor of the channels that ``op`` reads or gives."""
    return vector.reshape(-1, *(1,) * op.dims)
