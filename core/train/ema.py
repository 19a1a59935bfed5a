"""Power-function averages of the factors, tracked during training.

    theta_t = beta_t theta_(t-1) + (1 - beta_t) w_t,    beta_t = (1 - 1/t)^(gamma + 1)

w_t are the factors after t steps; the average then weighs them by a profile that grows as
t^gamma, whose width relative to t, sigma_rel, stays the same however long training goes on. Two of
them, saved now and then, make it possible to find the average of any other width afterwards.

Reference: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2), arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..power import gamma

WIDTHS = (0.05, 0.10)


class Tracker:
    """The averages of ``WIDTHS``, in float32 beside the factors.

    Attributes:
        states: sigma_rel -> the averages, in the order of the factors.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.states = {
            width: [factor.detach().to(torch.float32, copy=True) for factor in factors]
            for width in WIDTHS
        }
        self._exponents = {width: gamma(width) + 1 for width in WIDTHS}

    @torch.no_grad()
    def update(self, factors: Sequence[Tensor], step: int) -> None:
        """Take up ``factors`` as they are after ``step`` completed steps, 1 or more."""
        now = [factor.detach().float() for factor in factors]
        for width, averages in self.states.items():
            _lerp(averages, now, 1 - (1 - 1 / step) ** self._exponents[width])


_lerp = cast(
    "Callable[[Sequence[Tensor], Sequence[Tensor], float], None]",
    torch._foreach_lerp_,  # pyright: ignore
)
