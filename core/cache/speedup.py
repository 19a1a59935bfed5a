"""How much faster a schedule is, and which threshold gives a wanted speed-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ..checks import require_range
from ..errors import AdapterLabError

_SCAN, _HALVINGS, _DIGITS = 64, 24, 6
_ALL = 1e9  # a threshold that no error reaches


def speedup(skipped: int, steps: int) -> float:
    """Of a run where a skipped step costs nothing: steps / computed steps.

    Raises:
        AdapterLabError: not 0 <= ``skipped`` < ``steps``.
    """
    require_range("steps", steps, 1)
    require_range("skipped", skipped, 0, steps - 1)
    return steps / (steps - skipped)


def for_speedup(
    wanted: float, plan_at: Callable[[float], list[int]], steps: int
) -> tuple[float, list[int]]:
    """The threshold with the most skipped steps that are not faster than ``wanted``, and these.

    Where several do, it is the lowest, in as few digits as give the same steps.

    Args:
        plan_at: the skipped steps at a threshold.

    Raises:
        AdapterLabError: ``wanted`` is below 1, or above what is reached at any threshold.
    """
    require_range("speed_up", wanted, 1)
    most = math.floor(steps * (1 - 1 / wanted) + 1e-9)
    reach = len(plan_at(_ALL))
    if wanted > speedup(reach, steps) + 1e-9:
        raise AdapterLabError(
            f"A speed-up of {wanted:g} is out of reach",
            found=f"{speedup(reach, steps):.2f} at any threshold",
            fix="Raise k or lower the retention",
        )
    found = {0.0: plan_at(0.0)}
    for threshold in _tried(plan_at, most, reach):
        found[threshold] = plan_at(threshold)
    fitting = {at: plan for at, plan in found.items() if len(plan) <= most}
    best = max(map(len, fitting.values()))
    least = min(at for at, plan in fitting.items() if len(plan) == best)
    below = max((at for at in found if at < least), default=0.0)
    _, least = _halved(lambda at: len(plan_at(at)) != best, below, least)
    return _shortened(least, plan_at(least), plan_at)


def _tried(plan_at: Callable[[float], list[int]], most: int, reach: int) -> Iterable[float]:
    """Thresholds on both sides of the one looked for, of no larger size than it takes.

    A higher threshold can skip fewer steps, for a longer run ends elsewhere: so halving the
    interval alone is not enough.
    """
    top = 1.0
    while len(plan_at(top)) < min(most + 1, reach):
        top *= 2
    yield from (top * (i / _SCAN) ** 2 for i in range(1, _SCAN + 1))
    yield from _halved(lambda at: len(plan_at(at)) <= most, 0.0, top)


def _halved(is_low: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The two sides of where ``is_low`` changes, almost one number."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def _shortened(
    threshold: float, plan: list[int], plan_at: Callable[[float], list[int]]
) -> tuple[float, list[int]]:
    for digits in range(1, _DIGITS):
        short = float(f"{threshold:.{digits}g}")
        if plan_at(short) == plan:
            return short, plan
    return threshold, plan
