"""DoRA: a delta that turns the weight's rows or columns, and a learned length for each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Layer, Mode
from ..forms.layer import channels, unbiased
from ..tensors import Op, wide_dtype
from .base import Algorithm, Shape, Tensors
from .draw import Draw
from .wrapper import Wrapper

SCALE, MAGNITUDE = "dora_scale", "magnitude"
EPSILON = torch.finfo(torch.float32).eps


class DoRA(Wrapper):
    """W'(m) = W + m (V' - W), V' = V g, g = ``dora_scale`` / (||V|| + eps), V = W + dW.

    dW is the delta of ``inner`` at strength 1, whatever m is, so m = 0 is W and m = 1 is V'.
    The norm is over everything but one axis. ``dora_scale`` (out, 1, ..) means the output axis
    (LyCORIS since 3.2, peft, ai-toolkit), (1, in, ..) the input axis (LyCORIS before, OneTrainer).
    These shapes tell the two apart even where out or in is 1. ``magnitude``, peft's and
    ai-toolkit's vector, (out,) or peft's (1, out, 1, 1) of a convolution, means the output axis
    unless its length fits the input alone: of an embedding (number, width) peft scales the width.
    Where two axes fit a (1, n, 1, 1) it is an input's under the first name, an output's under the
    second.

    In training ||V|| is a constant to the gradient, as in peft, and dora_scale starts as ||W|| +
    eps, so that g is exactly 1.

    Args:
        tensors: ``dora_scale`` alone, of as many axes as the weight.
        axis: 0 output, 1 input.

    Attributes:
        gain: g, once it is settled for a weight.
        measured: what V is measured with, where it is not ``inner``.

    Reference: Liu et al. 2024, "DoRA", equation 5 and section 4.3; axes: LyCORIS, ``wd_on_output``.
    """

    suffixes = (SCALE, MAGNITUDE)

    def __init__(self, inner: Algorithm, tensors: Tensors, axis: int) -> None:
        super().__init__(inner, tensors)
        self.axis, self.strength = axis, 1.0
        self.gain: Tensor | None = None
        self.measured: Algorithm | None = None
        self.precise = (*inner.precise, SCALE)

    @classmethod
    def wrap(cls, inner: Algorithm, tensors: Tensors) -> Self:
        given = {name: tensors[name] for name in cls.suffixes if name in tensors}
        if len(given) > 1:
            raise AdapterLabError("DoRA lengths are given twice", found=", ".join(given))
        ((name, lengths),) = given.items()
        axis = _axis(lengths, inner.shape, vector=name == MAGNITUDE or lengths.ndim == 1)
        if axis is None or not lengths.is_floating_point():
            dtype = str(lengths.dtype).removeprefix("torch.")
            raise AdapterLabError(
                f"{name} fits no axis of the weight",
                found=f"{dtype} of shape {tuple(lengths.shape)}",
                expected=f"a length for each row or column of {tuple(inner.shape)}",
            )
        units = [1] * max(2, len(inner.shape), lengths.ndim)
        units[axis] = -1
        return cls(inner, {SCALE: lengths.reshape(units)}, axis)

    @property
    def reads_weight(self) -> bool:
        return True

    @property
    def reads_output(self) -> bool:
        return self.gain is not None and not self.axis and self.inner.reads_output

    @property
    def whole(self) -> str:
        return "DoRA on inputs takes norms over all rows" if self.axis else self.inner.whole

    @property
    def traits(self) -> tuple[str, ...]:
        return (*self.inner.traits, "DoRA on inputs" if self.axis else "DoRA")

    def mismatch(self, shape: Shape) -> str | None:
        lengths, given = self.tensors[SCALE].numel(), tuple(shape)
        if len(given) <= self.axis or lengths != given[self.axis]:
            return f"its DoRA has {lengths} lengths, the weight is {given}"
        return self.inner.mismatch(shape)

    def at(self, strength: float) -> Self:
        other = self._around(self.inner)
        other.strength = self.strength * strength
        return other

    def on(self, tensors: Tensors) -> Self:
        moved = super().on(tensors)
        moved.gain = None
        return moved

    @property
    def needs_weight_to_start(self) -> bool:
        return True

    @torch.no_grad()
    def started(self, weight: Tensor) -> Self:
        """Lengths of zero, which fresh ones are, become such that every g is exactly 1."""
        inner = self.inner.started(weight)
        other, own = self._around(inner), self.tensors[SCALE]
        if own.any():
            return other
        lengths = other._lengths(other._sum(weight, inner))
        lengths = lengths.to(own.device, torch.float32).reshape(own.shape)
        return other.on({**inner.tensors, SCALE: lengths})

    def drawn(self, draw: Draw) -> Algorithm | None:
        """Dropout is of the delta alone; lengths stay those of the whole W + dW, as in peft."""
        inner = self.inner.drawn(draw)
        if inner is None:
            return None
        other = self._around(inner)
        other.measured = self.inner
        return other

    def settled(self, weight: Tensor) -> Self:
        other = self._around(self.inner.settled(weight))
        other.gain = other._gain(weight)
        return other

    def state(self) -> dict[str, Tensor]:
        if self.strength != 1:
            raise AdapterLabError("DoRA has no strength that a file could hold")
        return super().state()

    def delta(self, weight: Tensor) -> Tensor:
        return self._turned(weight).sub_(weight).mul_(self.strength)

    def merge(self, weight: Tensor) -> Tensor:
        turned = self._turned(weight)
        if self.strength == 1:
            return weight.copy_(turned)
        return weight.lerp_(turned.to(weight), self.strength)

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """m ((g - 1) f(x) + g h(x)) with h of ``inner``; on inputs g scales x instead."""
        y = op(x, weight.to(x)) if y is None else y
        gain = self._gain(weight) if self.gain is None else self.gain
        gain = gain.to(x.device).flatten()
        if self.axis:
            scaled = x * channels(gain.repeat(op.groups), op).to(x)
            turned = op(scaled, weight.to(x)) + self.inner.bypass(scaled, op, weight)
            return (turned - y) * self.strength
        gain = channels(gain, op)
        h = self.inner.bypass(x, op, weight, y)
        return ((gain - 1) * self.strength).to(y) * y + (gain * self.strength).to(h) * h

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        """g (f(x) + h(x)), or on inputs f(g x) + h(g x).

        Keeps x and f(x) + h(x), or x and g x.
        """
        if mode == "rebuild" or self.strength != 1:
            return super().adapted(layer, x, mode)
        gain = self._gain(layer.weight()).to(x.device).flatten()
        if self.axis:
            gain = channels(gain.repeat(layer.op.groups), layer.op)
            return self.inner.adapted(layer, x * gain.to(x), mode)
        y = self.inner.adapted(layer, x, mode)
        if layer.bias is None and y.dtype.itemsize >= 4:
            return y * channels(gain, layer.op).to(y)
        # Bit by bit y where g is 1, and in 16 bits g would lose how far it is from 1.
        return torch.addcmul(y, unbiased(y, layer), channels(gain - 1, layer.op).to(y))

    def _sum(self, weight: Tensor, inner: Algorithm) -> Tensor:
        """W + dW of ``inner``, in memory of its own."""
        dtype, layout = wide_dtype(weight), torch.contiguous_format
        copied = weight.to(dtype, copy=True, memory_format=layout)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inner.tensors.values()):
            return copied + inner.delta(copied)
        return inner.merge(copied)

    def _turned(self, weight: Tensor) -> Tensor:
        """V', in memory of its own."""
        total = self._sum(weight, self.inner)
        return total.mul_(self._gain(weight, None if self.measured else total))

    def _gain(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """g, of the axes of V; ``total`` is V where it is known already."""
        with torch.no_grad():
            total = self._sum(weight, self.measured or self.inner) if total is None else total
            lengths = self._lengths(total)
        return self.tensors[SCALE].to(lengths).reshape(lengths.shape) / lengths

    def _lengths(self, total: Tensor) -> Tensor:
        """||V|| + eps, (out, 1, ..) or (1, in, 1, ..)."""
        norm = _column_norms(total) if self.axis else torch.norm_except_dim(total, 2, 0)
        return norm.add_(EPSILON)


def _axis(lengths: Tensor, shape: Shape, *, vector: bool) -> int | None:
    """The axis of a weight of ``shape`` that ``lengths`` belongs to; None for neither."""
    n, out, width = lengths.numel(), shape[0] if shape else 0, (*shape, 0, 0)[1]
    if not n or sum(size != 1 for size in lengths.shape) > 1:
        return None
    # Factors of a convolution may hide its kernel in the width.
    inputs = n == width or (len(shape) == 2 and lengths.ndim > 2 and width % n == 0)
    if vector:
        return 0 if n == out else 1 if inputs else None
    if n == 1:
        return 0 if out == 1 else 1 if inputs else None
    if len(lengths) == n:
        return 0 if n == out else None
    return 1 if inputs else 0 if n == out else None


def _column_norms(total: Tensor) -> Tensor:
    """Norms of the inputs of (out, in, *k), (1, in, 1, ..); by blocks of rows, for a norm across
    rows takes several times as long."""
    squares = total.new_zeros(total.shape[1:])
    for rows in torch.split(total, 64):
        squares += rows.square().sum(0)
    return (
        squares.reshape(len(squares), -1).sum(1).sqrt_().reshape(-1, *(1,) * (total.ndim - 2))[None]
    )
