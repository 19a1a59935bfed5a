"""Two calibrations of one model that cover different noise levels, as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .calibration import Calibration, Curve
from .timeline import SAME

_MISSING = 0.1  # share of a run's steps that may lie beyond the calibrated levels


def joined(old: Calibration, new: Calibration) -> Calibration:
    """``new``, with what ``old`` knows of noise levels beyond those of ``new`` and of branches."""
    both = {b: _joined(old.curves[b], c) for b, c in new.curves.items() if b in old.curves}
    return replace(new, curves={**old.curves, **new.curves, **both})


def span(calibration: Calibration) -> tuple[float, float]:
    """The highest and the lowest calibrated noise level."""
    curves = calibration.curves.values()
    return max(c.sigmas[0] for c in curves), min(c.sigmas[-1] for c in curves)


def covers(calibration: Calibration, sigmas: Sequence[float]) -> bool:
    """Whether a run of steps at ``sigmas`` is calibrated.

    A longer schedule comes closer to 0, another scheduler begins a bit elsewhere; one step, or a
    tenth of them, may lie beyond, where the ratios go on as at the edge.
    """
    high, low = span(calibration)
    beyond = sum(not low * (1 - SAME) <= s <= high * (1 + SAME) for s in sigmas)
    return beyond <= max(1, _MISSING * len(sigmas))


def _joined(old: Curve, new: Curve) -> Curve:
    """The points of ``new``, and those of ``old`` above and below them."""
    high, low = new.sigmas[0] * (1 + SAME), new.sigmas[-1] * (1 - SAME)
    kept = list(enumerate(old.sigmas))
    points = [
        *((old, i) for i, s in kept if s > high),
        *((new, i) for i in range(len(new.sigmas))),
        *((old, i) for i, s in kept if s < low),
    ]
    sigmas = tuple(curve.sigmas[i] for curve, i in points)
    steps = list(zip(points, points[1:], zip(sigmas, sigmas[1:], strict=False), strict=False))
    ratios = [
        curve.ratios[i] if last is curve else _between(old, new, ends)
        for (last, _), (curve, i), ends in steps
    ]
    # The first of a curve has nothing before it: what holds for the second is the closest.
    places = [points[0], *((curve, max(i, 1)) for curve, i in points[1:])]
    bends = [_bend(curve, old if curve is new else new, curve.sigmas[i]) for curve, i in points]
    known = [bend for bend in bends if bend is not None]
    return Curve(
        sigmas, (1.0, *ratios), tuple(c.spread[i] for c, i in places),
        tuple(c.cosine[i] for c, i in places), tuple(known) if known else (),
    )  # fmt: skip


def _between(old: Curve, new: Curve, sigmas: Sequence[float]) -> float:
    """The ratio of a step from the levels of one to those of the other: what both make of it."""
    logs = [curve.magnitudes(sigmas) for curve in (old, new)]
    return math.exp(sum(stop - start for start, stop in logs) / len(logs))


def _bend(own: Curve, other: Curve, sigma: float) -> float | None:
    known = own if own.bends else other
    return float(np.interp(sigma, known.sigmas[::-1], known.bends[::-1])) if known.bends else None
