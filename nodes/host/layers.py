"""The layers of a ComfyUI model, told by what they have and not by their class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import torch
import torch.nn as nn
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...core.tensors import Op

_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, a shared one under each of its paths.

    Several times as fast as ``named_modules``, which matters with two thousand of them.
    """
    found: dict[str, nn.Module] = {}
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, path: str, found: dict[str, nn.Module]) -> None:
    found[path] = module
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{path}.{name}" if path else name, found)


def dims(module: Any) -> int | None:
    """Spatial axes of a convolution, 0 of a linear layer, None for everything else.

    Quantised linears of ComfyUI are no ``nn.Linear``; banks of experts have three axes.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return 0 if len(weight.shape) == 2 else None
    return next((n for kind, n in _CONVOLUTIONS.items() if isinstance(module, kind)), None)


@dataclass(frozen=True)
class _Convolution(Op):
    """The module's own way to convolve: seamless tiling changes its padding after loading."""

    module: Any = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.module._conv_forward(x, weight, None)


def operation(module: nn.Module) -> Op:
    """The layer without its weight."""
    axes = dims(module)
    if not axes:
        return Op()
    conv: Any = module
    return _Convolution(axes, conv.stride, conv.padding, conv.dilation, conv.groups, conv)


def quantised(module: Any) -> str:
    """The format of a layer whose weight holds less than 16 bits a value; "" of any other."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, QuantizedTensor):
        return getattr(module, "quant_format", None) or _name(weight.storage_dtype)
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize > 1:
        return ""
    return _name(weight.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bare(patcher: Any, key: str, live: Any) -> Any:
    """The parameter ``live`` without what is merged into it for the clone that was loaded last.

    Clones of a model share its modules and one backup of what ComfyUI patched in them.
    """
    kept = patcher.backup.get(key)
    return live if kept is None else kept.weight


@contextmanager
def parameters(
    module: Any, device: torch.device, *, values: bool = True
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias as the layer computes with them, float32, on ``device``; not to be changed.

    Wherever ComfyUI keeps them (quantised, streamed in, patched at each use). Without ``values``
    the weight may stay quantised: only the bias is wanted.
    """
    if not hasattr(module, "comfy_cast_weights"):
        bias = module.bias
        yield wide(module.weight, device), None if bias is None else wide(bias, device)
        return
    dtype = torch.float32 if values else module.weight.dtype
    weight, bias, stream = comfy.ops.cast_bias_weight(
        module, dtype=dtype, device=device, bias_dtype=torch.float32, offloadable=True
    )
    try:
        yield full(weight, module, device) if values else weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def full(weight: Any, module: Any, device: torch.device) -> Tensor:
    """A weight of ``module`` as it acts, float32, on ``device``."""
    smoothing = getattr(module, "pre_quant_scale", None)  # the layer multiplies its input by it
    plain = wide(weight, device)
    return plain if smoothing is None else plain * wide(smoothing, device)


def wide(tensor: Any, device: torch.device) -> Tensor:
    """``tensor`` dequantised, float32, on ``device``."""
    plain = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
    return comfy.model_management.cast_to(plain, torch.float32, device)
