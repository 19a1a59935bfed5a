"""4-bit floating point numbers with a scale of each 16 and one of the whole weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...stored.layouts import tiled_up
from . import e4m3
from .base import SCALE, TINY, WEIGHT, WHOLE, Codes, Format, Info, Piece, Scales

_BLOCK = 16
_LARGEST = 6.0  # number of e2m1
_BIAS = 127  # of float32's exponents


class NvFp4(Format):
    """q = W / (s t) rounded to e2m1: s of each 16 columns in e4m3, t of the weight in float32.

    Reference: comfy-kitchen, ``TensorCoreNVFP4Layout``.
    """

    id = "nvfp4"
    title = "nvfp4"
    about = "4 bits, one scale every 16 numbers: half of fp8's size, four times its error"
    native = "nvfp4"
    multiple = (16, 16)
    compute = "NVIDIA Blackwell (RTX 50, B200)"
    end, normal = 7, 2

    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        rows, columns = shape
        scales = (-(-rows // 128) * 128, -(-columns // _BLOCK // 4) * 4)
        return {
            WEIGHT: (torch.uint8, (rows, columns // 2)),
            SCALE: (torch.float8_e4m3fn, scales),
            WHOLE: (torch.float32, ()),
        }

    def scales(self, peak: float) -> dict[str, Tensor]:
        return {WHOLE: (torch.tensor(peak) / (e4m3.LARGEST * _LARGEST)).clamp_min(TINY)}

    def code(self, exact: Tensor, scales: Scales) -> Piece:
        whole = scales[WHOLE]
        blocks = exact.view(len(exact), -1, _BLOCK)
        fine = blocks.abs().amax(-1).div_(_LARGEST).div_(whole).clamp_max_(e4m3.LARGEST)
        fine = fine.to(torch.float8_e4m3fn)
        scale = (fine.float() * whole)[..., None]
        # A block whose scale rounds to 0 is 0.
        y = (blocks / scale).masked_fill_(scale == 0, 0.0)
        size, code = _rounded(y.abs().clamp_max_(_LARGEST))
        missed = size.copysign_(y).mul_(scale).sub_(blocks).view(exact.shape)
        code |= y.view(torch.int32).bitwise_right_shift_(28).bitwise_and_(8)
        pairs = code.byte().view(torch.int16).view(len(exact), -1)  # the first in the low byte
        return Piece({WEIGHT: (pairs << 4 | pairs >> 8).byte(), SCALE: fine}, missed)

    def sizes(self, stored: Tensor) -> tuple[Codes, ...]:
        pairs, size = stored.numpy(), np.uint8(7)
        return (pairs & size, pairs >> np.uint8(4) & size)

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        return tiled_up(tensor) if name == SCALE else tensor


def _rounded(size: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, ties to even codes; and its code, int32."""
    binade = size.clamp_min(1.0).view(torch.int32).bitwise_and_(0x7F800000)  # of 1, 2 or 4
    half = binade.view(torch.float32) * 0.5  # its numbers are so far apart
    count = size.div_(half).round_()
    code = count.int().add_(binade.bitwise_right_shift_(22)).sub_(2 * _BIAS)
    return count.mul_(half), code


NVFP4 = NvFp4()
