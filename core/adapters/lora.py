"""LoRA: a product of two thin matrices, for linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..tensors import Op, kaiming_uniform, low_rank, tucker, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors, check_product, read_scale, require

# Ahead of its kin in menus.
ORDER = -1

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"


class LoRA(Algorithm):
    """dW = s B A, s = alpha / r.

    B is ``lora_up`` (out, r), A is ``lora_down`` (r, in). For a convolution A has the kernel,
    (r, in, *k), and B unit axes, (out, r, 1, ..). With Tucker decomposition the kernel is in
    ``lora_mid`` T (r, r, *k) and dW[o, i, *] = s sum_pq B[o, p] T[p, q, *] A[q, i].
    Unit axes that are missing or too many are accepted (DyLoRA writes B as (out, r) for any
    layer, old SD2 files write linear factors as 1 x 1 convolutions), and so is A flattened to
    (r, in * prod(k)).

    Reference: Hu et al. 2021, "LoRA", section 4.1; Tucker: Yeh et al. 2023, "Navigating
    Text-To-Image Customization", section 3; DyLoRA: Valipour et al. 2022.
    """

    name = "lora"
    title = "LoRA"
    suffixes = (UP, DOWN, MID)

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        up, down = require(factors, UP, DOWN)
        mid, width = factors.get(MID), up.flatten(1).shape[1]
        if mid is None:
            check_product(width == len(down), factors, UP, DOWN)
        else:
            point = down[0].numel() == down.shape[1]
            fits = point and (width, len(down)) == mid.shape[:2]
            check_product(fits, factors, UP, MID, DOWN)
        return cls(factors, read_scale(tensors, len(down), scale))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """A and T kaiming-uniform, B zero."""
        (out, width, *k), r = shape, config.rank
        unit = (1,) * len(k)
        tensors = {UP: torch.zeros(out, r, *unit, device=generator.device, dtype=torch.float32)}
        if config.tucker and any(n != 1 for n in k):
            tensors[DOWN] = kaiming_uniform((r, width, *unit), generator)
            tensors[MID] = kaiming_uniform((r, r, *k), generator)
        else:
            tensors[DOWN] = kaiming_uniform((r, width, *k), generator)
        return cls(tensors, config.scale)

    @property
    def rank(self) -> int:
        return len(self.tensors[DOWN])

    @property
    def shape(self) -> tuple[int, ...]:
        down, mid = self.tensors[DOWN], self.tensors.get(MID)
        rest = down.shape[1:] if mid is None else (down.shape[1], *mid.shape[2:])
        return (len(self.tensors[UP]), *rest)

    def delta(self, weight: Tensor) -> Tensor:
        up, down, mid = self._factors(weight)
        dense = up @ down if mid is None else tucker(mid, up, down)
        return dense.reshape(weight.shape)

    def bypass(self, x: Tensor, op: Op, weight: Tensor) -> Tensor:
        """s B (A x), with A (or A, then T) in the place of the layer's own kernel."""
        up, down, mid = self._factors(x)
        if mid is None:
            down = down.reshape(len(down), *weight.shape[1:])
        else:
            mid = mid.reshape(*mid.shape[:2], *weight.shape[2:]).to(x.dtype)
        return low_rank(x, op, up.to(x.dtype), down.to(x.dtype), mid)

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """s B (out, r), A (r, in * prod(k)) and T, wide."""
        up, down, mid = self.tensors[UP], self.tensors[DOWN], self.tensors.get(MID)
        up = wide(up, like).flatten(1) * self.scale
        return up, wide(down, like).flatten(1), None if mid is None else wide(mid, like)
