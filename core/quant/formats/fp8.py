"""8-bit floating point numbers with one scale a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import SCALE, WEIGHT, Encoded, Format, Info

_PIECE = 1 << 18  # numbers that are float32 at a time
_MULTIPLE = 16  # of both sizes, or cuBLAS can't multiply such matrices


class Fp8E4M3(Format):
    """q = W / s rounded to e4m3, s = max |W| / 448 in float32; nothing is clipped.

    Reference: ComfyUI 0.30.0, ``comfy/quant_ops.py``, ``TensorCoreFP8E4M3Layout``.
    """

    id = "fp8_e4m3"
    title = "fp8 e4m3, scaled"
    native = "float8_e4m3fn"
    dtype = torch.float8_e4m3fn

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and all(size % _MULTIPLE == 0 for size in shape)

    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        return {WEIGHT: (self.dtype, shape), SCALE: (torch.float32, ())}

    def encode(self, weight: Tensor) -> Encoded:
        largest = torch.finfo(self.dtype).max
        low, high = weight.aminmax()
        peak = torch.maximum(high.float(), -low.float())
        # A scale so small that its inverse overflows would turn zeros into NaN.
        scale = (peak / largest).clamp_min(torch.finfo(torch.float32).tiny)
        inverse = 1 / scale
        coded = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        rows = max(1, _PIECE // weight.shape[1])
        missed = total = 0.0
        for start in range(0, len(weight), rows):
            exact = weight[start : start + rows].float()
            piece = (exact * inverse).clamp_(-largest, largest).to(self.dtype)
            coded[start : start + rows] = piece
            missed += float((piece.float() * scale - exact).square_().sum(dtype=torch.float64))
            total += float(exact.square().sum(dtype=torch.float64))
        error = math.sqrt(missed / total) if total else 0.0
        return Encoded({WEIGHT: coded, SCALE: scale}, error)


FP8_E4M3 = Fp8E4M3()
