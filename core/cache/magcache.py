"""Which steps to skip: numbers only, known before sampling.

With the magnitude ratio g_t = mean ||r_t|| / ||r_(t-1)|| of the residuals r, a run of skipped steps
after the computed step c has the ratio R_t = g_(c+1) ... g_t and the error E = sum |1 - R_t|. A
step is skipped while E stays below a threshold and the run is at most ``k`` long.

Where a skipped step is filled with the line through the residuals computed last, at noise levels
s_a and s_b, the error is that of the line instead: E = sum w_t c_t |s_t - s_a| |s_t - s_b|, with
the measured bend c_t, about ||r''|| / (2 ||r||), and the step's share of the way in n steps,
w_t = (s_t - s_(t+1)) n / s_0, which is 1 for each of an even schedule.

Reference: Ma et al., MagCache (arXiv 2506.09045), section 3.3; what holds for single models is as
their published scripts have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import require_range
from ..errors import AdapterLabError
from .published import PLAIN, Special, special_of


@dataclass(frozen=True)
class Rule:
    """When a run of skipped steps may go on.

    Attributes:
        threshold: what its error E has to stay below; 0 allows no skip.
        k: how many steps long it may be; 0 allows no skip.
        retention: share of the steps, from the first, that are computed; at least one step is.
        guard_last: the last step is computed.

    Raises:
        AdapterLabError: one of them is out of range.
    """

    threshold: float
    k: int
    retention: float
    guard_last: bool = True
    special: Special = PLAIN

    def __post_init__(self) -> None:
        require_range("threshold", self.threshold, 0)
        require_range("k", self.k, 0)
        require_range("retention", self.retention, 0, 1)

    def reasons(self, steps: int, split: int | None = None) -> list[str]:
        """Why each of ``steps`` is computed whatever its ratio; "" for those that need not be.

        Args:
            split: the first step of the second expert, where there are two.
        """
        special, made = self.special, [""] * steps
        for start, stop in [(0, split), (split, steps)] if split else [(0, steps)]:
            first = min(stop, start + max(1, int((stop - start) * self.retention)))
            made[start:first] = ["retention"] * (first - start)
        if split and not special.high:
            made[:split] = ["high-noise expert"] * split
        if special.forced is not None:
            wanted, of = special.forced
            for t in range(steps):
                if _nearest(t, steps, of) == wanted:
                    made[t] = made[t] or "always computed"
        if self.guard_last:
            made[-1] = made[-1] or "last step"
        return made


class Course:
    """One branch on its way through the steps.

    Args:
        ratios: of each step to the one before, a number a step.
        reasons: of ``Rule.reasons``.
        bends: c of each step; None where the rule looks at ratios only.
        sigmas: of the steps, falling; needed with ``bends``.

    Attributes:
        position: in steps, -1 before the first.
        reason: why the step there has to be computed; "" where it may be skipped.
        ratio: R of the present run of skipped steps.
        error: E of it.
        length: how many steps it has.
    """

    def __init__(
        self,
        rule: Rule,
        ratios: Sequence[float],
        reasons: Sequence[str],
        bends: Sequence[float] | None = None,
        sigmas: Sequence[float] = (),
    ) -> None:
        self.rule, self.ratios, self.reasons, self.bends = rule, ratios, reasons, bends
        self._levels = (*sigmas, 0.0)  # the last step goes down to 0
        self.restart()

    def restart(self) -> None:
        """Begin before the first step."""
        self.position, self.reason = -1.0, ""
        self._known: list[float] = []  # s_a and s_b, as far as there are
        self._reset()

    def _reset(self) -> None:
        self.ratio, self.error, self.length = 1.0, 0.0, 0

    def wants(self, position: float) -> bool:
        """Go on to ``position`` (4.5 is halfway from step 4 to 5); whether it may be skipped.

        A step back may not: the rule knows the error of going on alone.
        """
        own, back = _between(self.ratios, self.position, position), position < self.position
        self.position, self.reason = position, self.reasons[int(position)]
        if back:
            self.reason = self.reason or "step back"
        if self.reason:
            return False
        self.ratio *= own
        self.length += 1
        self.error += self._added(position)
        rule = self.rule
        if abs(1 - own) > rule.special.closest:
            self.reason = "own ratio"
        elif self.length > rule.k:
            self.reason = "longest run"
        elif not self.error < rule.threshold:
            self.reason = "threshold"
        return not self.reason

    def computed(self) -> None:
        """The present step is computed after all: what is skipped next is judged against it."""
        self._reset()
        if self.bends is not None:
            sigma = self._sigma(self.position)
            self._known = [*(known for known in self._known if known != sigma), sigma][-2:]

    def _added(self, position: float) -> float:
        """What the step at ``position`` adds to the error."""
        if self.bends is None or len(self._known) < 2:
            return abs(1 - self.ratio)
        sigma, steps, t = self._sigma(position), len(self.bends), int(position)
        share = (self._levels[t] - self._levels[t + 1]) * steps / self._levels[0]
        bend = self.bends[min(round(position), steps - 1)]
        return share * bend * math.prod(abs(sigma - known) for known in self._known)

    def _sigma(self, position: float) -> float:
        t = int(position)
        return self._levels[t] + (position - t) * (self._levels[t + 1] - self._levels[t])


def plan(
    ratios: Sequence[float],
    steps: int,
    threshold: float,
    k: int,
    retention: float,
    *,
    guard_last: bool = True,
    special: Special | None = None,
) -> list[int]:
    """The steps that one branch skips, counted from 0.

        >>> plan([1.0, 1.02, 0.99, 0.97, 0.9], steps=10, threshold=0.12, k=4, retention=0.2)
        [2, 3, 4, 5, 7]

    Args:
        ratios: published or calibrated, the leading 1 included; for any number of steps, as each
            of the run takes the nearest.
        steps: of the run that is planned.
        threshold: what the error E of a run of skipped steps has to stay below; 0.06 is careful.
        k: how many steps may be skipped in a row.
        retention: share of the steps, from the first, that are computed; at least one step is.
        guard_last: the last step is computed, which the reference does not ask for.
        special: what holds for the model; None: for the model whose published list ``ratios`` is,
            if it is one. Two experts are planned as one model: where the other takes over is known
            in sampling only.

    Raises:
        AdapterLabError: ``steps`` is below 1, ``ratios`` are not positive numbers, or a setting is
            out of range.
    """
    require_range("steps", steps, 1)
    special = special_of(ratios) if special is None else special
    rule = Rule(threshold, k, retention, guard_last, special)
    course = Course(rule, interpolated(ratios, steps), rule.reasons(steps))
    return skipped([course], steps)


def skipped(branches: Sequence[Course], steps: int) -> list[int]:
    """The steps skipped where all of the branches, evaluated together, agree."""
    made: list[int] = []
    for t in range(steps):
        wants = [branch.wants(t) for branch in branches]
        if all(wants):
            made.append(t)
        else:
            for branch in branches:
                branch.computed()
    return made


def interpolated(ratios: Sequence[float], steps: int) -> list[float]:
    """A list for ``steps`` steps: each has the ratio of the nearest of the given ones."""
    check_ratios(ratios)
    return [ratios[_nearest(t, steps, len(ratios))] for t in range(steps)]


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse what can't be magnitude ratios."""
    bad = next((i for i, r in enumerate(ratios) if not 0 < r < math.inf), None)
    if bad is not None or len(ratios) == 0:
        raise AdapterLabError(
            "These are no magnitude ratios",
            found=f"{ratios[bad]} at place {bad + 1}" if bad is not None else "none",
            expected="positive numbers, one a step",
        )


def _nearest(t: int, steps: int, of: int) -> int:
    """The step of ``of`` that step ``t`` of ``steps`` maps to; halves go to the even one.

    In the order of the published scripts, whose rounding decides where a half is missed.
    """
    return of - 1 if steps == 1 else round(t * ((of - 1) / (steps - 1)))


def _between(ratios: Sequence[float], start: float, stop: float) -> float:
    """The ratio of the residual at ``stop`` to that at ``start``."""
    made = 1.0
    for t in range(int(max(start, 0.0)) + 1, math.ceil(stop) + 1):
        share = min(t, stop) - max(t - 1, start)
        made *= ratios[min(t, len(ratios) - 1)] ** share
    return made
