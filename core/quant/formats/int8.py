"""8-bit integers with one scale a row, on the weight as it is or rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...stored.layouts import rotated
from .base import SCALE, WEIGHT, Codes, Format, Info, Piece, Scales

_LARGEST = 127
_LEAST = 1e-30  # a scale, as comfy-kitchen has it
_GROUPS = (256, 64, 16)  # columns that turn together; NVIDIA's kernel has the first, or multiplies


class Int8Row(Format):
    """q = W / s rounded, s = max |row| / 127.

    Reference: comfy-kitchen, ``TensorWiseINT8Layout`` with ``per_channel``.
    """

    id = "int8_row"
    title = "int8, scaled by row"
    about = "8 bits, one scale a row: less error than fp8 where no number stands out"
    native = "int8_tensorwise"
    multiple = (8, 8)
    compute = "NVIDIA Turing and newer (RTX 20 and newer)"
    dequantises = False  # ComfyUI 0.30.0, ``comfy/ops.py``, leaves it to comfy-kitchen's kernels
    end, normal = _LARGEST, 1

    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        return {WEIGHT: (torch.int8, shape), SCALE: (torch.float32, (shape[0], 1))}

    def code(self, exact: Tensor, scales: Scales) -> Piece:
        scale = exact.abs().amax(1, keepdim=True).div_(_LARGEST).clamp_min_(_LEAST)
        back = (exact / scale).round_()
        q = back.to(torch.int8)
        return Piece({WEIGHT: q, SCALE: scale}, back.mul_(scale).sub_(exact))

    def sizes(self, stored: Tensor) -> tuple[Codes, ...]:
        return (stored.abs().numpy(),)


class Int8ConvRot(Int8Row):
    """The same of W H, H a regular Hadamard matrix, which spreads outliers over a group of columns.

    Weights whose columns no group divides stay as they are, scaled by row.

    Reference: ConvRot (arXiv 2512.03673), comfy-kitchen ``tensor/int8_utils.py``.
    """

    id = "int8_convrot"
    title = "int8, rotated and scaled by row"
    about = "the same on rotated weights: a third of fp8's error whatever stands out"

    def options(self, shape: tuple[int, ...]) -> dict[str, Any]:
        size = _group(shape[-1])
        return {"convrot": True, "convrot_groupsize": size} if size else {}

    def turned(self, exact: Tensor) -> Tensor:
        size = _group(exact.shape[-1])
        return rotated(exact, size) if size else exact


def _group(columns: int) -> int:
    return next((size for size in _GROUPS if columns % size == 0), 0)


INT8_ROW, INT8_CONVROT = Int8Row(), Int8ConvRot()
