"""LoRAs whose ranks differ between the items of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..tensors import Op, low_rank, unit_axes
from .draw import along, thinned
from .lora import LoRA
from .wrapper import Wrapper


class ByItem(Wrapper):
    """A wrapper that differs between the items of a batch: there is no one delta."""

    @property
    def by_item(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        raise AdapterLabError(
            "Dropout of activations has no weight to rebuild",
            fix="Set 'forward' to auto or bypass",
        )


class Ranks(ByItem):
    """A LoRA whose rank channels are masked, h(x) = s B (mask o A x).

    Args:
        inner: the LoRA. mask: (b, r), or None; for ranks of several parts of r it is repeated.
        rate, seed: of dropout on what is left.
    """

    def __init__(self, inner: LoRA, mask: Tensor | None, rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(inner)
        self.mask, self.rate, self.seed = mask, rate, seed

    @property
    def lora(self) -> LoRA:
        """``inner``, which is one."""
        assert isinstance(self.inner, LoRA)
        return self.inner

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        up, down, mid = self.lora.factors(x)
        up = up.to(x.dtype)
        if mid is None:
            down = down.reshape(len(down), *weight.shape[1:])
        else:
            mid = mid.reshape(*mid.shape[:2], *weight.shape[2:]).to(x.dtype)
        same = torch.eye(up.shape[1], dtype=x.dtype, device=x.device).repeat(op.groups, 1)
        h = low_rank(x, op, same, down.to(x.dtype), mid)
        if self.rate:
            h = thinned(h, self.rate, self.seed)
        if self.mask is not None:
            h = h * along(self.mask, h, 1 if op.dims else -1)
        return Op(op.dims, groups=op.groups)(h, unit_axes(up, op.dims))
