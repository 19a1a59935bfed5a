"""8-bit floating point numbers with a power of two as scale of each 32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stored.layouts import tiled_up
from . import e4m3
from .base import SCALE, WEIGHT, Codes, Format, Info, Piece, Scales

_BLOCK = 32
_MANTISSA = 23  # bits of float32, below its exponent


class MxFp8(Format):
    """q = W / s rounded to e4m3, s the least power of two at which a block of 32 columns fits.

    Reference: OCP Microscaling Formats 1.0, section 5; comfy-kitchen, ``TensorCoreMXFP8Layout``.
    """

    id = "mxfp8"
    title = "mxfp8"
    about = "8 bits, one scale every 32 numbers"
    native = "mxfp8"
    multiple = (32, 32)
    compute = "NVIDIA Blackwell (RTX 50, B200) with torch 2.10 or newer"
    end, normal = e4m3.END, e4m3.NORMAL

    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        rows, columns = shape
        scales = (-(-rows // 128) * 128, -(-columns // _BLOCK // 4) * 4)
        return {WEIGHT: (torch.float8_e4m3fn, shape), SCALE: (torch.float8_e8m0fnu, scales)}

    def code(self, exact: Tensor, scales: Scales) -> Piece:
        blocks = exact.view(len(exact), -1, _BLOCK)
        peak = blocks.abs().amax(-1)
        # Up to the next exponent, by the bits: a logarithm may miss powers of two on GPUs.
        power = (peak / e4m3.LARGEST).view(torch.int32) + ((1 << _MANTISSA) - 1) >> _MANTISSA
        scale = (power.clamp_min(1) << _MANTISSA).view(torch.float32)[..., None]
        q = (blocks * (1 / scale)).to(torch.float8_e4m3fn)
        missed = e4m3.numbers(q, scale).sub_(blocks)
        parts = {WEIGHT: q.view(exact.shape), SCALE: power.byte().view(torch.float8_e8m0fnu)}
        return Piece(parts, missed.view(exact.shape))

    def sizes(self, stored: Tensor) -> tuple[Codes, ...]:
        return (e4m3.sizes(stored),)

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        return tiled_up(tensor) if name == SCALE else tensor


MXFP8 = MxFp8()
