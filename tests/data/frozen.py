"""Frozen layers for adapters in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from adapter_lab.core.tensors import Op
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# name: weight shape, the layer without its weight, input shape
SHAPES = {
    "linear": ((16, 12), Op(), (2, 3, 12)),
    "conv2d": ((16, 12, 3, 3), Op(2, (2, 1), (1, 2), (1, 1)), (2, 12, 5, 4)),
    "conv1d 1x1": ((16, 12, 1), Op(1), (2, 12, 5)),
    "grouped": ((16, 6, 3, 3), Op(2, (1, 1), (1, 1), (1, 1), groups=2), (2, 12, 4, 4)),
}


@dataclass
class Frozen:
    """A layer as a model has it, with or without a bias."""

    values: Tensor
    op: Op
    bias: Tensor | None = None
    plain: bool = True

    def base(self, x: Tensor) -> Tensor:
        op = self.op
        if not op.dims:
            return F.linear(x, self.values, self.bias)
        args = (op.stride, op.padding, op.dilation, op.groups)
        return _CONV[op.dims](x, self.values, self.bias, *args)

    def weight(self) -> Tensor:
        return self.values


def frozen(
    name: str, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Frozen, Tensor]:
    """The layer, and an input for it."""
    shape, op, size = SHAPES[name]
    generator = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(s, generator=generator).to(dtype) for s in (shape, size))
    added = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    return Frozen(weight, op, added), x
