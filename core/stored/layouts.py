"""What the numbers of each format of quantised weights stand for.

A layout is a function (q, scale, tensors beside q by suffix, options) -> float32 W.

Reference: comfy-kitchen, ``backends/eager`` and ``tensor/*.py``; the order of block scales is
cuBLAS' (https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterLabError

Layout = Callable[[Tensor, Tensor, Mapping[str, Tensor], Mapping[str, Any]], Tensor]
PACKED = ("nvfp4", "convrot_w4a4")  # two numbers a byte
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ROTATED = 256  # columns of a rotation where nothing says otherwise


def blocked(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` times the scale of each block, in its place.

    Args:
        weight: float32 (out, in, *k).
        scale: of one number; one a row, (out,) or (out, 1); or one a block, (m, n) or (m, n, 1)
            for m x n equal blocks.

    Raises:
        AdapterLabError: the blocks are not equal.
    """
    scale = scale.to(torch.float32)
    if scale.numel() == 1:
        return weight.mul_(scale.reshape(()))
    counts = list(scale.shape)
    if len(counts) > weight.ndim and counts[-1] == 1:
        counts.pop()
    counts += [1] * (weight.ndim - len(counts))
    shape = weight.shape
    if len(counts) != len(shape) or any(n % c for n, c in zip(shape, counts, strict=True)):
        raise AdapterLabError(
            "the scales do not fit the weight",
            found=f"{tuple(scale.shape)} for a weight of {tuple(shape)}",
        )
    sizes = [size for n, c in zip(shape, counts, strict=True) for size in (c, n // c)]
    weight.view(sizes).mul_(scale.reshape([n for c in counts for n in (c, 1)]))
    return weight


def tiled(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) out of tiles of 128 x 4, each stored as 32 rows of 4 x 4."""
    across, down = -(-rows // 128), -(-columns // 4)
    if scale.numel() != across * 128 * down * 4:
        raise AdapterLabError(
            "the scales do not fit the weight",
            found=f"{scale.numel()} of them", expected=f"{across * 128 * down * 4}",
        )  # fmt: skip
    tiles = scale.reshape(across, down, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(across * 128, down * 4)[:rows, :columns]


def tiled_up(scale: Tensor) -> Tensor:
    """Scales (rows, columns), multiples of 128 and 4, in the order that :func:`tiled` reads."""
    rows, columns = scale.shape
    tiles = scale.view(torch.uint8).reshape(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(scale.dtype)


def rotated(weight: Tensor, size: int) -> Tensor:
    """W turned, or turned back: each ``size`` columns times the regular Hadamard matrix.

    It is its own inverse. Reference: ConvRot, comfy-kitchen ``tensor/int8_utils.py``.
    """
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0 or weight.shape[-1] % size:
        raise AdapterLabError(
            "the rotation does not fit the weight",
            found=f"groups of {size} for a weight of {tuple(weight.shape)}",
        )
    groups = weight.reshape(*weight.shape[:-1], -1, size)
    return (groups @ _hadamard(size).to(weight.device)).reshape(weight.shape)


@lru_cache(4)
def _hadamard(size: int) -> Tensor:
    four = 1 - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def _scaled(q: Tensor, scale: Tensor, beside: object, options: object) -> Tensor:
    return blocked(q.to(torch.float32), scale)


def _int8(q: Tensor, scale: Tensor, beside: object, options: Mapping[str, Any]) -> Tensor:
    weight = blocked(q.to(torch.float32), scale)
    return rotated(weight, _group(options)) if options.get("convrot") else weight


def _int4(q: Tensor, scale: Tensor, beside: object, options: Mapping[str, Any]) -> Tensor:
    """Signed numbers, the even columns in the low half of a byte."""
    byte = q.view(torch.uint8)
    halves = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2).to(torch.float32)
    weight = blocked(halves - 16 * (halves >= 8), scale)
    return rotated(weight, _group(options))


def _group(options: Mapping[str, Any]) -> int:
    size: object = options.get("convrot_groupsize", _ROTATED)
    if not isinstance(size, int):
        raise AdapterLabError("the size of the rotation is no number", found=repr(size))
    return size


def _mxfp8(q: Tensor, scale: Tensor, beside: object, options: object) -> Tensor:
    """Powers of two, one every 32 columns."""
    rows, columns = _matrix(q, 32)
    bits = tiled(scale.view(torch.uint8), rows, columns // 32).to(torch.int32) << 23
    return blocked(q.to(torch.float32), bits.view(torch.float32))


def _nvfp4(
    q: Tensor, scale: Tensor, beside: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Tensor:
    """Sign and one of eight sizes, the even columns in the high half of a byte; a scale every 16
    columns, and one of the whole."""
    if "weight_scale_2" not in beside:
        raise AdapterLabError("the scale of the whole weight is missing")
    byte = q.view(torch.uint8)
    codes = torch.stack([byte >> 4, byte & 15], dim=-1).flatten(-2)
    rows, columns = _matrix(codes, 16)
    table = torch.tensor([*_E2M1, *(-n for n in _E2M1)])
    fine = tiled(scale.view(torch.float8_e4m3fn).float(), rows, columns // 16)
    return blocked(table[codes.int()], fine * beside["weight_scale_2"].float())


def _matrix(q: Tensor, block: int) -> tuple[int, int]:
    if q.ndim != 2 or q.shape[1] % block:
        raise AdapterLabError("the weight is no matrix of whole blocks", found=str(tuple(q.shape)))
    return q.shape[0], q.shape[1]


LAYOUTS: Mapping[str, Layout] = {
    "float8_e4m3fn": _scaled,
    "float8_e5m2": _scaled,
    "int8_tensorwise": _int8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "convrot_w4a4": _int4,
}
