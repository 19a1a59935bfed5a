"""Pure tensor functions shared by the algorithms."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Op:
    """A linear layer (``dims`` 0) or convolution (``dims`` 1-3) without its weight and bias."""

    dims: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight``: (out, in) or (out, in / groups, *k)."""
        if self.dims == 0:
            return F.linear(x, weight)
        conv = _CONV[self.dims]
        return conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
