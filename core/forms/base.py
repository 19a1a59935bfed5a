"""The contract of a form, and the pass through a linear layer that has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .layer import Layer, Mode, owned

Grads = tuple[Tensor, ...]
# What an elementwise pass costs for each element, in multiplications of a large matrix product.
TOUCH = 25


class Form(ABC):
    """D of h(x) = x D^T as a function of a few tensors, with its backward pass written out.

    All methods but :meth:`adapted` and :meth:`beside` are outside of autograd and know no scale. x
    is (tokens, in), y and g, the gradient of y, are (tokens, out); all of one dtype, that of the
    tensors.

    Attributes:
        tensors: what D is made of; they carry the gradients.
        scale: of D, a factor of the first tensor that is not kept multiplied.
        keeps: whether :meth:`into` gives a narrow activation that the backward pass wants back.
    """

    keeps: ClassVar[bool] = False

    def __init__(self, *tensors: Tensor, scale: float = 1.0) -> None:
        self.tensors, self.scale = tensors, scale

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @abstractmethod
    def into(self, x: Tensor, y: Tensor) -> Tensor | None:
        """y += x D^T in place; gives the narrow activation, if the form keeps one."""

    @abstractmethod
    def grads(self, x: Tensor, g: Tensor, gx: Tensor | None, kept: Tensor | None) -> Grads:
        """Gradients of the tensors; ``gx`` += g D in place unless it is None."""

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """W + D in memory of its own."""

    def rebuilt_grads(self, x: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Grads]:
        """The gradient of x in a layer of W + D, and those of the tensors."""
        return g @ self.merged(weight), self.grads(x, g, None, None)

    @abstractmethod
    def cost(self, tokens: int) -> tuple[float, float]:
        """Multiplications of the bypass and of rebuilding, forward and backward, beyond the frozen
        layer's own; an elementwise pass counts as ``TOUCH`` of them an element."""

    def beside(self, x: Tensor) -> Tensor:
        """h(x) for x (..., in), differentiable."""
        return _Beside.apply(self, x, *self.tensors)

    def ready(self, dtype: torch.dtype, *tensors: Tensor) -> Self:
        """The form of ``tensors``, its scale in the first of them."""
        first, *rest = tensors
        if self.scale != 1:
            first = first.to(torch.promote_types(dtype, torch.float32)) * self.scale
        return type(self)(first.to(dtype), *(t.to(dtype) for t in rest))

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        """f(x) + h(x) for x (..., in), differentiable. Of a layer whose weight lies in memory
        nothing is kept but x, the tensors and what :attr:`keeps` says."""
        if mode == "auto" and layer.plain and x.dtype.itemsize >= 4:
            # In 16 bits W + D would lose the digits of D.
            bypass, rebuild = self.cost(x.numel() // x.shape[-1])
            mode = "rebuild" if rebuild < bypass else "bypass"
        if mode == "rebuild" or layer.plain:
            return _Whole.apply(self, layer, mode == "rebuild", x, *self.tensors)
        return layer.base(x) + self.beside(x)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, *tensors: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], form.shape[0])
        kept = form.ready(x.dtype, *tensors).into(_flat(x), _flat(y))
        _keep(ctx, form, x, tensors, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        form, x, kept = _kept(ctx)
        gx = None
        if ctx.needs_input_grad[1]:
            gx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        grads = form.grads(_flat(x), _flat(outer[0]), None if gx is None else _flat(gx), kept)
        return None, gx, *_given(ctx, grads, 2)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: Form, layer: Layer, rebuild: bool, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.layer, ctx.rebuild = layer, rebuild
        kept = None
        if rebuild:
            wide = torch.promote_types(x.dtype, torch.float32)
            merged = form.ready(wide, *tensors).merged(layer.weight().to(wide)).to(x.dtype)
            y = F.linear(x, merged, None if layer.bias is None else layer.bias.to(x.dtype))
        else:
            y = layer.base(x).contiguous()
            kept = form.ready(x.dtype, *tensors).into(_flat(x), _flat(y))
        _keep(ctx, form, x, tensors, kept)
        return owned(y)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        form, x, kept = _kept(ctx)
        g, wants_x, gx = _flat(outer[0]), ctx.needs_input_grad[3], None
        if ctx.rebuild and wants_x:
            gx, grads = form.rebuilt_grads(_flat(x), g, ctx.layer.weight().to(x.dtype))
        else:
            gx = g @ ctx.layer.weight().to(x.dtype) if wants_x else None
            grads = form.grads(_flat(x), g, gx, kept)
        gx = None if gx is None else gx.view(x.shape)
        return None, None, None, gx, *_given(ctx, grads, 4)


def _keep(ctx: Any, form: Form, x: Tensor, tensors: Grads, kept: Tensor | None) -> None:
    # Without tensors: those of the form are held by what is saved, or not at all.
    ctx.form, ctx.dtypes = type(form)(scale=form.scale), [t.dtype for t in tensors]
    ctx.save_for_backward(x, kept, *tensors)


def _kept(ctx: Any) -> tuple[Form, Tensor, Tensor | None]:
    x, kept, *tensors = ctx.saved_tensors
    return ctx.form.ready(x.dtype, *tensors), x, kept


def _given(ctx: Any, grads: Grads, first: int) -> tuple[Tensor | None, ...]:
    """``grads`` of the tensors, the inputs from ``first`` on, as autograd wants them."""
    scale, wanted = ctx.form.scale, ctx.needs_input_grad[first:]
    grads = grads if scale == 1 else (grads[0] * scale, *grads[1:])
    pairs = zip(grads, ctx.dtypes, wanted, strict=True)
    return tuple(g.to(dtype) if want else None for g, dtype, want in pairs)
