"""Where in its whole schedule a noise level is."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from .magcache import Rule

RISING = "The noise levels rise: what was computed at less noise says nothing about more"
SAME = 1e-4  # relative: sigmas closer than that are the same
_SNAP = 1e-3  # of a step: samplers that convert sigmas hit their steps only nearly


@dataclass(frozen=True)
class Timeline:
    """The whole schedule of which a run may do a part.

    Attributes:
        sigmas: of its steps, strictly falling; the last one, where no step starts, is left out.
        start: the step that the run starts with.
        stop: the one after its last.
        how: what the schedule is known by, as users read it.
        cut: the run's last step goes to 0 at once, though the schedule has more steps.
        off: why no step of the run can be skipped; "" where some may be.
    """

    sigmas: tuple[float, ...]
    start: int
    stop: int
    how: str = ""
    cut: bool = False
    off: str = ""

    @classmethod
    def whole(cls, sigmas: Sequence[float], how: str = "as given") -> Timeline:
        """Of a run that does all of it; ``sigmas`` with the last one, in any order."""
        levels = falling(sigmas)
        steps = tuple(levels[:-1] or levels or [0.0])
        return cls(steps, 0, len(steps), how, off=RISING if rising(sigmas) else "")

    @property
    def steps(self) -> int:
        return len(self.sigmas)

    def position(self, sigma: float) -> float:
        """Of a noise level, in steps: 0 to below ``steps``; between two of them linear in sigma."""
        made = self._position(sigma)
        if abs(made - round(made)) < _SNAP:
            made = float(round(made))
        return min(made, math.nextafter(self.steps, 0))

    def _position(self, sigma: float) -> float:
        after = bisect_left(self.sigmas, -sigma, key=lambda s: -s)  # the first that is not above
        if after == 0:
            return 0.0
        high = self.sigmas[after - 1]
        low = self.sigmas[after] if after < self.steps else 0.0
        return after - 1 + (high - sigma) / (high - low) if high > low else after - 1.0

    def split(self, boundary: float) -> int | None:
        """The first step of the second of two experts; None where one does all.

        A run that does a part of the schedule starts or stops where the other expert takes over;
        one that does all of it passes there at a noise level of ``boundary`` (of a flow model, 0
        to 1).
        """
        edges = [edge for edge in (self.start, self.stop) if 0 < edge < self.steps]
        if edges:
            return min(edges, key=lambda edge: abs(self.sigmas[edge] - boundary))
        made = sum(sigma >= boundary for sigma in self.sigmas)
        return made if 0 < made < self.steps else None

    def reasons(self, rule: Rule, highest: float = math.inf, lowest: float = 0.0) -> list[str]:
        """Why each step is computed whatever its ratio; "" for those that need not be.

        Args:
            highest: the noise level from which on steps may be skipped.
            lowest: the one down to which they may, itself left out.
        """
        boundary = rule.special.boundary
        made = rule.reasons(self.steps, None if boundary is None else self.split(boundary))
        if self.cut and rule.guard_last:
            made[self.stop - 1] = made[self.stop - 1] or "last step"
        for t, sigma in enumerate(self.sigmas):
            if not lowest < sigma <= highest:
                made[t] = made[t] or "outside the range"
        return made


def falling(sigmas: Sequence[float]) -> list[float]:
    """The different noise levels, highest first."""
    return sorted({float(s) for s in sigmas if math.isfinite(s)}, reverse=True)


def rising(sigmas: Sequence[float]) -> bool:
    """Whether no step goes to less noise and one goes to more."""
    pairs = list(zip(sigmas, sigmas[1:], strict=False))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def placed(part: Sequence[float], full: Sequence[float], how: str = "") -> Timeline | None:
    """The schedule ``full`` if a run of ``part`` is a part of it; both fall and have a last one.

    A run that goes to 0 at once after some steps of the schedule is a part of it.
    """
    if min(len(part), len(full)) < 2:
        return None
    start = min(range(len(full)), key=lambda i: abs(full[i] - part[0]))
    last = start + len(part) - 1
    if last >= len(full):
        return None
    pairs = list(zip(part, full[start : last + 1], strict=True))
    cut = part[-1] == 0 < full[last]
    if not all(math.isclose(a, b, rel_tol=SAME) for a, b in (pairs[:-1] if cut else pairs)):
        return None
    return Timeline(tuple(full[:-1]), start, last, how, cut)
