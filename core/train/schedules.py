"""Learning rate schedules: the share of the peak rate, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TIMESCALE = 10_000  # steps over which the inverse square root falls without a warm-up


@dataclass(frozen=True)
class Shape:
    """What a schedule may depend on besides the step.

    Args:
        warmup: steps of linear warm-up, the last of which has the peak rate.
        cycles: descents of "cosine with restarts".
        power: exponent of "polynomial".
        decay: share of the steps in which "wsd" goes down.
        final: share of the peak rate where a descent ends.
    """

    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2
    final: float = 0.0


def _cosine(p: float, shape: Shape) -> float:
    return 0.5 * (1 + math.cos(math.pi * p))


def _restarts(p: float, shape: Shape) -> float:
    return _cosine(shape.cycles * p % 1.0, shape) if p < 1 else 0.0


def _wsd(p: float, shape: Shape) -> float:
    start = 1 - shape.decay
    return 1.0 if p <= start else 1 - math.sqrt(min(1.0, (p - start) / shape.decay))


# name -> the share at p, the part in [0, 1] of the steps after the warm-up that is done.
_DESCENTS: Mapping[str, Callable[[float, Shape], float]] = {
    "linear": lambda p, _: 1 - p,
    "cosine": _cosine,
    # Loshchilov and Hutter 2017, "SGDR", section 3, with cycles of one length.
    "cosine with restarts": _restarts,
    "polynomial": lambda p, shape: (1 - p) ** shape.power,
    # Hu et al. 2024, "MiniCPM", section 4; down as in Haegele et al. 2024, "Scaling Laws and
    # Compute-Optimal Training Beyond Fixed Training Durations", equation 2.
    "wsd": _wsd,
    # Chen et al. 2021, "REX: Revisiting Budgeted Training with an Improved Schedule", section 3.
    "rex": lambda p, _: (1 - p) / (0.5 + 0.5 * (1 - p)),
}
SCHEDULES = ("constant", *_DESCENTS, "inverse sqrt")


def share(name: str, step: int, steps: int, shape: Shape) -> float:
    """Share of the peak learning rate at ``step``, in [0, 1].

    Args:
        name: one of ``SCHEDULES``.
        step: counted from 0; the last of a run is ``steps - 1``.
    """
    after = step - shape.warmup
    if after < 0:
        return (step + 1) / shape.warmup
    if name == "constant":
        return 1.0
    if name == "inverse sqrt":  # Vaswani et al. 2017, "Attention Is All You Need", section 5.3
        timescale = shape.warmup or _TIMESCALE
        return math.sqrt(timescale / (after + timescale))
    p = min(1.0, after / max(1, steps - shape.warmup))
    return shape.final + (1 - shape.final) * _DESCENTS[name](p, shape)
