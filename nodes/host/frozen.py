"""A frozen layer of a ComfyUI model that keeps nothing for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import comfy.ops
import torch
import torch.nn as nn
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from .layers import full, operation, quantised


class HostLayer:
    """Implements :class:`core.train.layer.Layer` over a module of ComfyUI.

    Where the weight is not in memory as the layer computes with it (quantised, in another dtype,
    streamed in, patched at each use), the module's own forward runs outside autograd and the
    backward pass asks for the weight again, so that no copy of it lives from one to the other.

    Attributes:
        op: the layer without weight and bias.
        forward: the module's own forward, without what stands in for it.
        alone: whether that computes with the weight and nothing beside it.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module, self.device, self.alone = module, device, True
        self.op = operation(module)
        self.forward: Callable[..., Tensor] = module.forward

    @property
    def plain(self) -> bool:
        """Whether the layer computes with the tensor that its module holds."""
        return self.alone and is_resident(self.module, self.device)

    @property
    def bias(self) -> Tensor | None:
        """The bias as it acts, on the device."""
        bias = getattr(self.module, "bias", None)
        functions = getattr(self.module, "bias_function", ())
        if bias is None or (is_plain(bias, self.device) and not functions):
            return bias
        with cast(self.module, bias.dtype, self.device) as (_, used):
            return None if used is None else used.clone()

    def giving(self, y: Tensor) -> HostLayer:
        """The layer for an x whose f(x) is known."""
        known: Any = copy(self)
        known.alone, known.base = False, lambda _: y
        return known

    def weight(self) -> Tensor:
        """(out, in, *k), plain: the module's own where it computes with that."""
        if is_resident(self.module, self.device):
            return self.module.weight
        with cast(self.module, _dtype(self.module), self.device) as (weight, _):
            # What was cast may be in a buffer that the next layer is copied to.
            return weight.clone()

    def base(self, x: Tensor) -> Tensor:
        """f(x), with a gradient for x alone."""
        if not torch.is_grad_enabled():
            return _own(self.forward(x), x)
        if not x.requires_grad:
            return self.forward(x)
        if self.plain and self.module.weight.dtype == x.dtype:
            return self.forward(x)
        return _Frozen.apply(x, self)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: HostLayer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        # One of ComfyUI's fp8 layers clamps its input in place.
        given = x.clone() if isinstance(layer.module, comfy.ops.fp8_ops.Linear) else x
        return _own(layer.forward(given), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, (grad,) = ctx.layer, grads
        with cast(layer.module, grad.dtype, grad.device) as (weight, _):
            if not layer.op.dims:
                return (grad.flatten(0, -2) @ weight).reshape(ctx.shape), None
            # Paddings of any mode: the host's own convolution knows them.
            x = grad.new_zeros(ctx.shape, requires_grad=True)
            with torch.enable_grad():
                y = layer.op(x, weight)
            return torch.autograd.grad(y, x, grad)[0], None


def _own(y: Tensor, x: Tensor) -> Tensor:
    """``y`` as a tensor that is no view, in the same memory: models add in place to what layers
    give, which autograd forbids for a view that a function made."""
    if y is x:
        return y.clone()
    plain = torch.empty(0, dtype=y.dtype, device=y.device)
    return plain.set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())


def is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether ``tensor`` is ordinary numbers of 16 bits or more on ``device``."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
    return ordinary and tensor.dtype.itemsize > 1 and tensor.device == device


def is_resident(module: Any, device: torch.device) -> bool:
    """Whether ``module`` computes with its parameters where and as they are."""
    if getattr(module, "weight_function", ()) or getattr(module, "bias_function", ()):
        return False
    # Whatever an input is multiplied by belongs to the weight as it acts.
    smoothed = getattr(module, "pre_quant_scale", None) is not None
    parameters = [p for p in module._parameters.values() if p is not None]
    return not smoothed and all(is_plain(p, device) for p in parameters)


@contextmanager
def cast(
    module: Any, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias as ``module`` computes with them, dequantised, not to be kept or changed."""
    own = getattr(module, "cast_bias_weight", None)  # of loaders with formats of their own (GGUF)
    if own is not None:
        yield own(dtype=dtype, device=device, bias_dtype=dtype)
        return
    if not hasattr(module, "comfy_cast_weights"):
        bias = module.bias
        yield module.weight.to(device, dtype), None if bias is None else bias.to(device, dtype)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
    )
    try:
        smoothed = getattr(module, "pre_quant_scale", None) is not None
        if smoothed or isinstance(weight, QuantizedTensor):
            yield full(weight, module, device).to(dtype), bias
        else:
            yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _dtype(module: Any) -> torch.dtype:
    """Of the values of a weight: float32 of what holds less than 16 bits, which loses nothing."""
    dtype = module.weight.dtype
    narrow = quantised(module) or not dtype.is_floating_point or dtype.itemsize < 2
    return torch.float32 if narrow else dtype
