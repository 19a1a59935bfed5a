"""What a skipped step is filled with: the residuals of the last computed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import AdapterLabError

Parts = tuple[Tensor, ...]  # one residual; several streams where a model has video and audio
_ORDER = 2  # residuals that a line needs


class Trace:
    """The computed residuals of one conditioning, the last two of them, with their sigmas."""

    def __init__(self, length: int = _ORDER) -> None:
        self.length = length
        self.points: list[tuple[float, Parts]] = []

    def put(self, sigma: float, parts: Sequence[Tensor]) -> None:
        """Remember a residual; one of the same sigma is replaced."""
        kept = [point for point in self.points if point[0] != sigma]
        self.points = [*kept, (sigma, tuple(parts))][-self.length :]

    def at(self, sigma: float) -> bool:
        """Whether there is a residual of this sigma."""
        return any(point[0] == sigma for point in self.points)


def reuse(trace: Trace, sigma: float, ratio: float) -> Parts:
    """r = r_c, that of the last computed step, as MagCache has it."""
    return trace.points[-1][1]


def scaled(trace: Trace, sigma: float, ratio: float) -> Parts:
    """r = R r_c, with the ratio of the magnitudes that is expected."""
    return tuple(part * ratio for part in trace.points[-1][1])


def first_order(trace: Trace, sigma: float, ratio: float) -> Parts:
    """r = r_b + (r_c - r_b) (s - s_b) / (s_c - s_b), on the line through the last two; else r_c."""
    if len(trace.points) < _ORDER:
        return reuse(trace, sigma, ratio)
    (start, before), (stop, last) = trace.points
    if [part.shape for part in before] != [part.shape for part in last]:
        return last
    weight = (sigma - start) / (stop - start)
    pairs = zip(before, last, strict=True)
    return tuple(torch.lerp(one.to(two.device), two, weight) for one, two in pairs)


FILLS: dict[str, Callable[[Trace, float, float], Parts]] = {
    "reuse": reuse,
    "scaled": scaled,
    "first order": first_order,
}
BEST = "first order"  # what "auto" is


def filled(name: str, trace: Trace, sigma: float, ratio: float) -> Parts:
    """The residual at ``sigma``, where the magnitude is expected to be ``ratio`` times the last's.

    Raises:
        AdapterLabError: nothing is called ``name``.
    """
    return FILLS[_known(name)](trace, sigma, ratio)


def length(name: str) -> int:
    """How many residuals the fill ``name`` needs; raises as ``filled`` does."""
    return _ORDER if FILLS[_known(name)] is first_order else 1


def _known(name: str) -> str:
    name = BEST if name == "auto" else name
    if name not in FILLS:
        raise AdapterLabError(f"Unknown fill '{name}'", expected=f"one of auto, {', '.join(FILLS)}")
    return name
