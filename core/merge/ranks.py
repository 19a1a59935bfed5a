"""The rules that choose the rank of each module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..lowrank import Spectrum
from .menus import RULES

# rule -> (what the parameter may be, as users read it; above; up to; from users of the tools)
_LIMITS: dict[str, tuple[str, float, float]] = {
    "fixed": ("any number, it is not used", -math.inf, math.inf),
    "sv_ratio": ("a number from 1, such as 4", 1.0, math.inf),
    "sv_fro": ("above 0 and up to 1, such as 0.95", 0.0, 1.0),
    "sv_cumulative": ("above 0 and up to 1, such as 0.9", 0.0, 1.0),
    "error": ("above 0 and below 1, such as 0.05", 0.0, 1.0),
}
_ZERO = 1e-6  # largest singular value of a matrix of zeros, as in sd-scripts


@dataclass(frozen=True)
class RankRule:
    """How many singular values S_1 >= S_2 >= ... of a (out, in * prod(k)) matrix are kept.

    fixed: ``rank`` of them. sv_ratio: those above S_1 / parameter. sv_fro: those whose norm is
    parameter of the norm of all. sv_cumulative: likewise of their sum. These three keep one or two
    more than they say and never fewer than 2, as sd-scripts does. error: the fewest with
    ||M - M_r|| <= parameter ||M||.

    Args:
        rule: one of ``RULES``.
        rank: at most so many, 0 for no limit. conv_rank: the same for convolutions of k x k,
            0: as ``rank``. pointwise: whether it counts for 1 x 1 convolutions as well.

    Raises:
        AdapterLabError: an unknown rule, a parameter out of its range, a negative rank.

    Reference: sd-scripts ``networks/resize_lora.py`` (the three sv rules).
    """

    rule: str = "fixed"
    parameter: float = 0.0
    rank: int = 0
    conv_rank: int = 0
    pointwise: bool = False

    def __post_init__(self) -> None:
        if self.rule not in _LIMITS:
            raise AdapterLabError(
                "There is no such rank rule", found=self.rule, expected=", ".join(RULES)
            )
        expected, low, high = _LIMITS[self.rule]
        above = self.parameter >= low if self.rule == "sv_ratio" else self.parameter > low
        below = self.parameter < high if self.rule == "error" else self.parameter <= high
        if self.rule != "fixed" and not (above and below and math.isfinite(self.parameter)):
            raise AdapterLabError(
                f"The parameter does not suit the rule {self.rule}",
                found=f"{self.parameter:g}", expected=expected,
            )  # fmt: skip
        if self.rank < 0 or self.conv_rank < 0:
            raise AdapterLabError(
                "A rank is negative", found=f"{min(self.rank, self.conv_rank)}", expected="from 0"
            )

    def cap(self, shape: Sequence[int]) -> int:
        """The largest rank for a weight of ``shape``; min(out, in * prod(k)) where none is set."""
        kernel = len(shape) > 2 and (self.pointwise or math.prod(shape[2:]) > 1)
        limit = (kernel and self.conv_rank) or self.rank
        side = min(shape[0], math.prod(shape[1:]))
        return min(limit, side) if limit else side

    def choose(self, spectrum: Spectrum, shape: Sequence[int]) -> int:
        """The rank for a module; never more than the matrix has.

        Args:
            spectrum: with enough singular values: see :meth:`settled`.
            shape: (out, in, *k) of the weight.
        """
        side = min(shape[0], math.prod(shape[1:]))
        return min(self._asked(spectrum, side), self.cap(shape), spectrum.rank)

    def settled(self, spectrum: Spectrum, shape: Sequence[int]) -> bool:
        """Whether the singular values that are known decide the rank."""
        known = len(spectrum.s)
        if spectrum.whole or known >= self.cap(shape):
            return self.rule != "sv_cumulative" or spectrum.nuclear is not None
        if self.rule == "sv_cumulative" and spectrum.nuclear is None:
            return False
        return self.rule != "fixed" and self._asked(spectrum, known + 3) < known

    def _asked(self, spectrum: Spectrum, side: int) -> int:
        """By the rule alone, of a matrix with ``side`` singular values."""
        s = spectrum.s.double()
        if not len(s) or float(s[0]) <= (_ZERO if self.rule.startswith("sv") else 0.0):
            return 1
        if self.rule == "fixed":
            return side
        if self.rule == "error":
            return self._within(spectrum)
        if self.rule == "sv_ratio":
            index = int((s > s[0] / self.parameter).sum())
        else:
            index = self._share(s, spectrum) + 1
        return max(1, min(index, side - 1)) + 1

    def _share(self, s: Tensor, spectrum: Spectrum) -> int:
        """Index of the singular value with which the sum, or that of squares, is enough."""
        if self.rule == "sv_fro":
            sums, target = s.square().cumsum(0) / spectrum.total**2, self.parameter**2
        else:
            assert spectrum.nuclear is not None, "not settled"
            sums, target = s.cumsum(0) / spectrum.nuclear, self.parameter
        return int(torch.searchsorted(sums.float(), target))

    def _within(self, spectrum: Spectrum) -> int:
        """The smallest rank whose error is within the parameter; all known ones if none is."""
        errors = _errors(spectrum)
        fitting = (errors <= self.parameter).nonzero()
        return int(fitting[0]) + 1 if len(fitting) else len(spectrum.s)


def _errors(spectrum: Spectrum) -> Tensor:
    """(q,): the relative error of each rank 1 .. q."""
    squares = spectrum.s.double().square()
    tails = squares.flip(0).cumsum(0).flip(0) - squares + spectrum.rest**2
    return (tails.clamp(min=0) / spectrum.total**2).sqrt()
