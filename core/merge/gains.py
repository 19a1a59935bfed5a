"""The lengths that DoRA gives the inputs or outputs of a weight, fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.dora import SCALE
from ..lowrank import Spectrum
from .factors import lora_of
from .noise import linalg


class Gains:
    """A factor for each input or output of W (out, in, *k), float32.

    Attributes:
        base: W as (out, in * prod(k)). squares: of the lengths.
    """

    def __init__(self, weight: Tensor, on_input: bool) -> None:
        self.base, self.on_input = weight.flatten(1), on_input
        self.kernel = self.base.shape[1] // weight.shape[1]
        squares: Tensor = linalg.vector_norm(self.base, dim=0 if on_input else 1).square_()
        self.squares = self.summed(squares).clamp_(min=torch.finfo().tiny)

    def summed(self, sums: Tensor) -> Tensor:
        """Sums over the rows or columns of the matrix -> of each input or output."""
        return sums.reshape(-1, self.kernel).sum(1) if self.on_input else sums

    def spread(self, gain: Tensor) -> Tensor:
        """A number for each input or output, to multiply the matrix by."""
        return gain.repeat_interleave(self.kernel)[None] if self.on_input else gain[:, None]

    def step(self, target: Tensor, low: Spectrum | None) -> Tensor:
        """<W' - W g - L, W> / ||W||^2 of each input or output, L the low-rank part if any."""
        along = torch.einsum("ij,ij->j" if self.on_input else "ij,ij->i", target, self.base)
        if low is not None:
            up = low.u * low.s
            along -= (((up.T @ self.base) * low.vh).sum(0) if self.on_input else
                      (up * (self.base @ low.vh.T)).sum(1))  # fmt: skip
        return self.summed(along) / self.squares

    def turned(
        self, gain: Tensor, low: Spectrum, shape: Sequence[int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of L + W g; overwrites W."""
        spread = self.spread(gain)
        low = (replace(low, vh=low.vh / spread) if self.on_input else
               replace(low, u=low.u / spread))  # fmt: skip
        tensors = lora_of(low, len(low.s), shape, dtype)
        up, down = (tensors[f"lora_{x}.weight"].float().flatten(1) for x in ("up", "down"))
        # Of the factors as they are stored: their rounding must not change the lengths.
        turned = self.base.addmm_(up, down)
        squares: Tensor = linalg.vector_norm(turned, dim=0 if self.on_input else 1).square_()
        lengths = self.summed(squares).sqrt_() * gain
        units = [1] * len(shape)
        units[1 if self.on_input else 0] = -1
        return {**tensors, SCALE: lengths.reshape(units)}
