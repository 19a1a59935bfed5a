"""A schedule before sampling: which steps are skipped, and by what error the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..checks import require_range
from .calibration import Calibration
from .known import Known
from .magcache import Course, Rule, skipped
from .published import BRANCHES
from .speedup import for_speedup


@dataclass(frozen=True)
class Numbers:
    """What a schedule of some steps is planned by.

    Attributes:
        ratios: branch -> a number a step, the leading 1 included.
        bends: the same of errors of extrapolation; empty where the rule looks at ratios.
        sigmas: of the steps, falling.
        errors: of what a threshold is for, "magnitude" or "extrapolation".
    """

    ratios: Mapping[str, Sequence[float]]
    bends: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    sigmas: Sequence[float] = ()

    @property
    def steps(self) -> int:
        return len(self.ratios["cond"])

    @property
    def errors(self) -> str:
        return "extrapolation" if self.bends else "magnitude"

    def courses(self, rule: Rule) -> dict[str, Course]:
        """Each branch before its first step."""
        reasons = rule.reasons(self.steps)
        return {
            branch: Course(rule, ratios, reasons, self.bends.get(branch), self.sigmas)
            for branch, ratios in self.ratios.items()
        }

    def together(self, rule: Rule) -> list[int]:
        """What is skipped where the branches are evaluated together."""
        return skipped([*self.courses(rule).values()], self.steps)


@dataclass(frozen=True)
class Step:
    """What was found at one step of a branch.

    Attributes:
        own: its ratio to the step before.
        error: of the run of skipped steps with this one, 0 where it is computed anyway.
        reason: why it is computed, "" where it is skipped.
    """

    own: float
    error: float
    reason: str


@dataclass(frozen=True)
class Plan:
    """Each branch by itself, and what both skip where they are evaluated together.

    Attributes:
        name: of the ratios, as users read it.
        errors: of what the threshold is for, "magnitude" or "extrapolation".
    """

    name: str
    rule: Rule
    branches: dict[str, list[Step]]
    together: list[int]
    errors: str = "magnitude"

    @property
    def steps(self) -> int:
        return len(self.branches["cond"])


def planned(name: str, numbers: Numbers, rule: Rule) -> Plan:
    """The schedule by ``numbers``."""
    steps = range(numbers.steps)
    found = {b: [_step(course, t) for t in steps] for b, course in numbers.courses(rule).items()}
    return Plan(name, rule, found, numbers.together(rule), numbers.errors)


def faster(numbers: Numbers, rule: Rule, wanted: float) -> Rule:
    """``rule`` with the threshold whose speed-up comes closest to ``wanted`` from below.

    Raises:
        AdapterLabError: ``wanted`` is below 1, or out of reach.
    """

    def at(threshold: float) -> list[int]:
        return numbers.together(replace(rule, threshold=threshold))

    return replace(rule, threshold=for_speedup(wanted, at, numbers.steps)[0])


def numbers_for(known: Known, steps: int, *, bends: bool = False) -> Numbers:
    """Numbers for each of ``steps`` steps; one branch where both are the same.

    A calibration's are for noise levels that are spread as its own; lists don't depend on them.

    Args:
        bends: those of a calibration, too.
    """
    require_range("steps", steps, 1)
    sigmas: Sequence[float] = range(steps, 0, -1)
    if isinstance(known, Calibration):
        own = known.curve("cond").sigmas
        sigmas = np.interp(np.linspace(0, len(own) - 1, steps), range(len(own)), own).tolist()
    of = {branch: [*known.ratios(branch, sigmas)] for branch in BRANCHES}
    bent = {b: [*known.bends(b, sigmas)] for b in BRANCHES} if bends else {}
    bent = bent if all(bent.values()) else {}
    if (of["cond"], bent.get("cond")) == (of["uncond"], bent.get("uncond")):
        of, bent = ({b: n for b, n in one.items() if b == "cond"} for one in (of, bent))
    return Numbers(of, bent, sigmas)


def _step(course: Course, t: int) -> Step:
    skips = course.wants(t)
    error = 0.0 if course.reasons[t] else course.error
    made = Step(course.ratios[t], error, "" if skips else course.reason)
    if not skips:
        course.computed()
    return made
