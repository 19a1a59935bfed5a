"""A weight in a format, piece by piece, and what it loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .formats import WEIGHT, Format

_PIECE = 1 << 18  # numbers that are float32 at a time: few enough for the caches of processors
_CPU = torch.device("cpu")
_BITS = {
    1: (torch.int8, torch.uint8), 2: (torch.int16, torch.uint16), 4: (torch.int32, torch.uint32),
    8: (torch.int64, torch.uint64),
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """What a weight lost.

    Attributes:
        error: ||W' - W|| / ||W||.
        saturated: share of its numbers at the largest size that their scale allows.
        subnormal: share of its numbers too small for the format's full precision, though not 0.
    """

    error: float
    saturated: float
    subnormal: float


def largest(weight: Tensor) -> float:
    """The size of the largest number of a weight of any float dtype; NaN or infinity if it has any.

    Sizes are in the order of their bits, and a NaN above all.
    """
    signed, unsigned = _BITS[weight.itemsize]
    # Numbers below 0 are the last without a sign, by their size.
    below = int(weight.view(unsigned).numpy().max()) & torch.iinfo(signed).max
    top = max(int(weight.view(signed).numpy().max()), below)
    return float(torch.tensor(top, dtype=signed).view(weight.dtype))


def encode(
    form: Format, weight: Tensor, peak: float, device: torch.device = _CPU
) -> tuple[dict[str, Tensor], Quality]:
    """Quantise a finite weight (out, in) of any float dtype that :meth:`.Format.fits`.

    Args:
        peak: of its :func:`largest` number. device: to work on, with a few MiB at a time.

    Returns:
        CPU tensors by their name below the layer's path, in ``form.layout`` of the shape; what
        they lost.
    """
    shape = tuple(weight.shape)
    scales = form.scales(peak)
    made = {key: _zeros(*one) for key, one in form.layout(shape).items() if key not in scales}
    unit = _unit(peak)
    missed = total = 0.0
    zeros = ends = small = 0
    step = max(1, _PIECE // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        exact = form.turned(weight[rows].to(device, torch.float32))
        zeros += int(np.count_nonzero(exact.cpu().numpy() == 0))
        parts, lost = form.code(exact, scales)
        for name, part in parts.items():
            made[name][rows][: len(part), : part.shape[1]] = part
        total += _squared(exact, unit)
        missed += _squared(lost, unit)
        for codes in form.sizes(made[WEIGHT][rows]):
            ends += int(np.count_nonzero(codes == form.end))
            small += int(np.count_nonzero(codes < form.normal))
    count = weight.numel()
    error = math.sqrt(missed / total) if total else 0.0
    quality = Quality(error, ends / count, max(small - zeros, 0) / count)
    return {name: form.ordered(name, part) for name, part in made.items()} | scales, quality


def _zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.uint8 if dtype.itemsize == 1 else dtype  # torch fills no float of a byte
    return torch.zeros(shape, dtype=size).view(dtype)


def _unit(peak: float) -> float:
    """What to multiply numbers with so that the sum of their squares is a float32."""
    return 1.0 if 1e-12 < peak < 1e12 or not peak else 1 / max(peak, 1e-36)


def _squared(piece: Tensor, unit: float) -> float:
    flat = (piece if unit == 1 else piece * unit).view(-1)
    return float(torch.dot(flat, flat))
