"""8-bit floating point numbers with one scale a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from . import e4m3
from .base import SCALE, TINY, WEIGHT, Codes, Format, Info, Piece, Scales


class Fp8E4M3(Format):
    """q = W / s rounded to e4m3, s = max |W| / 448 in float32; nothing is clipped.

    Reference: ComfyUI 0.30.0, ``comfy/quant_ops.py``, ``TensorCoreFP8E4M3Layout``.
    """

    id = "fp8_e4m3"
    title = "fp8 e4m3, scaled"
    about = "8 bits, one scale a weight"
    native = "float8_e4m3fn"
    multiple = (16, 16)  # or cuBLAS can't multiply such matrices
    compute = "NVIDIA Ada, Hopper and Blackwell (RTX 40 and newer), AMD RDNA 4"
    end, normal = e4m3.END, e4m3.NORMAL

    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        return {WEIGHT: (torch.float8_e4m3fn, shape), SCALE: (torch.float32, ())}

    def scales(self, peak: float) -> dict[str, Tensor]:
        # A scale so small that its inverse overflows would turn zeros into NaN.
        return {SCALE: (torch.tensor(peak) / e4m3.LARGEST).clamp_min(TINY)}

    def code(self, exact: Tensor, scales: Scales) -> Piece:
        scale = scales[SCALE]
        q = (exact * (1 / scale)).to(torch.float8_e4m3fn)
        return Piece({WEIGHT: q}, e4m3.numbers(q, scale).sub_(exact))

    def sizes(self, stored: Tensor) -> tuple[Codes, ...]:
        return (e4m3.sizes(stored),)


FP8_E4M3 = Fp8E4M3()
