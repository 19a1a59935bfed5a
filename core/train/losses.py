"""What an error of the network costs, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .process import Noise


def _mse(difference: Tensor, _c: Tensor) -> Tensor:
    """Its square."""
    return difference.square()


def _huber(difference: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c): pseudo-Huber, d^2 for small errors."""
    return c * _smooth_l1(difference, c)


def _smooth_l1(difference: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c): the same over c, 2 |d| for large errors."""
    square = difference.square()
    # The same without a difference of nearly equal numbers.
    return 2 * square / ((square + c.square()).sqrt() + c)


def _l1(difference: Tensor, _c: Tensor) -> Tensor:
    """Its absolute value."""
    return difference.abs()


# As sd-scripts defines them (--loss_type; Charbonnier et al. 1997 for the pseudo-Huber loss).
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
    "l1": _l1,
}


def _constant(_noise: Noise, t: Tensor, c: float) -> Tensor:
    return torch.full_like(t, c)


def _exponential(_noise: Noise, t: Tensor, c: float) -> Tensor:
    """From 1 at clean latents to c at noise."""
    return c**t


def _snr(noise: Noise, t: Tensor, c: float) -> Tensor:
    """(1 - c) / (1 + sigma)^2 + c with sigma = 1 / sqrt(SNR): the same ends."""
    return (1 - c) / (1 + noise.snr(t).rsqrt()).square() + c


# As sd-scripts (--huber_schedule); "Improving Diffusion Models's Data-Corruption Resistance using
# Scheduled Pseudo-Huber Loss", Khrapov et al. 2024, section 4.
SCHEDULES: dict[str, Callable[[Noise, Tensor, float], Tensor]] = {
    "constant": _constant,
    "exponential": _exponential,
    "snr": _snr,
}


def element_losses(name: str, difference: Tensor, c: Tensor) -> Tensor:
    """Loss of each element.

    Args:
        name: a key of ``LOSSES``.
        difference: (b, ...) what the network says less what it should.
        c: (b,) where squares turn into absolute values, for "huber" and "smooth_l1".
    """
    return LOSSES[name](difference, c.view(-1, *(1,) * (difference.ndim - 1)))
