"""bfloat16 factors under updates that are smaller than their resolution of 2^-8.

A float32 number is a bfloat16 one, its upper 16 bits, and what that leaves over, its lower 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 1 << 15
_UPPER = ~0xFFFF


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` (float32) as the nearest bfloat16 and the int16 that is left over.

    The compensation of Kahan's summation (Kahan 1965, "Further remarks on reducing truncation
    errors"), kept as bits: it has the 16 bits that a bfloat16 would take, but nothing is lost.
    """
    bits = value.contiguous().view(torch.int32)
    upper = (bits + _HALF) & _UPPER
    return upper.view(torch.float32).to(torch.bfloat16), (bits - upper).to(torch.int16)


def joined(value: Tensor, rest: Tensor) -> Tensor:
    """The float32 that :func:`split` took apart, bit for bit."""
    return (value.float().contiguous().view(torch.int32) + rest).view(torch.float32)


def stochastic(value: Tensor, generator: torch.Generator) -> Tensor:
    """``value`` (float32) as one of the two bfloat16 around it, whose mean is ``value``.

    Reference: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.2.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    rounded = ((bits + noise) & _UPPER).view(torch.float32)
    # What is no finite number has no neighbours: its bits plus noise mean something else.
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
