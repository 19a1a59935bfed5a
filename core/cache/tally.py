"""What is computed and skipped of a sampling run, and how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .speedup import speedup
from .timeline import Timeline

_CELLS = 250  # of a branch; longer runs have several noise levels in one


@dataclass
class Visit:
    """Evaluations one after the other at one noise level."""

    sigma: float
    start: float  # seconds
    computed: int = 0
    skipped: int = 0


@dataclass
class Cell:
    """One noise level of a branch, or several that follow each other.

    Attributes:
        step: counted from 1; between two steps a fraction.
        skipped, all: evaluations.
        reason: why the others were computed, "" where several noise levels are in one cell.
    """

    step: float
    sigma: float
    skipped: int = 0
    all: int = 0
    reason: str = ""


class Tally:
    """Of one run.

    Attributes:
        rows: of each branch what was decided, in the order of the evaluations: the noise level,
            whether it was skipped, and why it was not.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.rows: dict[str, list[tuple[float, bool, str]]] = {}
        self.visits: list[Visit] = []

    def add(self, branch: str, sigma: float, skip: bool, reason: str) -> None:
        """Note what was decided for a conditioning at ``sigma``, before that is done."""
        if not self.visits or self.visits[-1].sigma != sigma:
            self.visits.append(Visit(sigma, time.perf_counter()))
        visit = self.visits[-1]
        visit.computed, visit.skipped = visit.computed + (not skip), visit.skipped + skip
        self.rows.setdefault(branch, []).append((sigma, skip, reason))

    @property
    def steps(self) -> int:
        """Noise levels that were visited."""
        return len({visit.sigma for visit in self.visits})

    @property
    def computed(self) -> int:
        """Those of them at which something was computed."""
        return len({visit.sigma for visit in self.visits if visit.computed})

    @property
    def skipped(self) -> int:
        """Evaluations."""
        return sum(visit.skipped for visit in self.visits)

    def predicted(self) -> float:
        """How many times faster than a run that computes all it is if what is skipped is free."""
        return speedup(self.skipped, sum(visit.computed + visit.skipped for visit in self.visits))

    def measured(self, now: float) -> float | None:
        """How many times faster than a run that computes all it was; None if unknown.

        That is what the evaluations would have taken, at the mean of the computed ones, by what
        they took. The first noise level, where weights are loaded, counts as if it were average.

        Args:
            now: seconds, when the last evaluation is done.
        """
        starts = [visit.start for visit in self.visits] + [now]
        spans = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        rest = list(zip(self.visits, spans, strict=True))[1:]
        whole = [(visit.computed, span) for visit, span in rest if not visit.skipped]
        count, seconds = sum(n for n, _ in whole), sum(span for _, span in whole)
        if not count or not seconds:
            return None
        each, first = seconds / count, self.visits[0].computed
        evaluations = first + sum(visit.computed + visit.skipped for visit, _ in rest)
        return each * evaluations / (each * first + sum(span for _, span in rest))

    def cells(self, branch: str) -> list[Cell]:
        """One for each noise level in the order of sampling; where there are many, for several."""
        made: list[Cell] = []
        levels: dict[float, Cell] = {}
        last = math.inf
        for sigma, skip, reason in self.rows[branch]:
            if sigma > last:  # the sampler starts again
                levels = {}
            last = sigma
            if sigma not in levels:
                levels[sigma] = Cell(round(self.timeline.position(sigma) + 1, 2), sigma)
                made.append(levels[sigma])
            cell = levels[sigma]
            cell.skipped, cell.all = cell.skipped + skip, cell.all + 1
            cell.reason = cell.reason or reason
        size = math.ceil(len(made) / _CELLS)
        if size < 2:
            return made
        return [_joined(made[i : i + size]) for i in range(0, len(made), size)]


def _joined(cells: Sequence[Cell]) -> Cell:
    skipped, every = sum(cell.skipped for cell in cells), sum(cell.all for cell in cells)
    return Cell(cells[0].step, cells[0].sigma, skipped, every)
