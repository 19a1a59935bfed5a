"""What a run computed and skipped, counted, timed and cut into cells."""

from __future__ import annotations

import pytest
from adapter_lab.core.cache.tally import Tally, Visit
from adapter_lab.core.cache.timeline import Timeline

FOUR = (1.0, 0.75, 0.5, 0.25)


def tally(decisions: dict[str, str], sigmas: tuple[float, ...] = FOUR) -> Tally:
    """Branch -> what was decided, a letter a step (s: skipped)."""
    made = Tally(Timeline.whole([*sigmas, 0.0]))
    for t, sigma in enumerate(sigmas):
        for branch, letters in decisions.items():
            skip = letters[t] == "s"
            made.add(branch, sigma, skip, "" if skip else "threshold")
    return made


def test_counts_steps_and_what_they_cost() -> None:
    """One of 4 steps is left out, and of the evaluations 3 of 8: 8 / 5."""
    made = tally({"cond": "cssc", "uncond": "cscc"})
    assert (made.steps, made.computed, made.skipped) == (4, 3, 3)
    assert made.predicted() == pytest.approx(8 / 5)
    cells = made.cells("cond")
    assert [(cell.skipped, cell.all) for cell in cells] == [(0, 1), (1, 1), (1, 1), (0, 1)]
    assert (cells[3].step, cells[3].sigma, cells[3].reason) == (4, 0.25, "threshold")


def test_measures_against_the_mean_computed_step() -> None:
    """10 s warm-up, then 2, 0.5, 2 and 0.5 s: 5 evaluations of 2 s in 2 + 5 s."""
    made = Tally(Timeline.whole([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))
    starts = zip((0.0, 10.0, 12.0, 12.5, 14.5), (1, 1, 0, 1, 0), strict=True)
    made.visits = [Visit(5.0 - i, at, n, 1 - n) for i, (at, n) in enumerate(starts)]
    assert made.measured(15.0) == pytest.approx(10 / 7)
    made.visits = made.visits[:1]
    assert made.measured(15.0) is None


def test_a_long_run_of_many_windows_has_few_cells() -> None:
    sigmas = [1 - i / 1000 for i in range(1000)]
    made = Tally(Timeline.whole([*sigmas, 0.0]))
    for t, sigma in enumerate(sigmas):
        for _ in range(4):
            made.add("cond", sigma, t % 2 == 1, "" if t % 2 else "threshold")
    cells = made.cells("cond")
    assert len(cells) == 250
    assert sum(cell.all for cell in cells) == 4000 == 2 * sum(cell.skipped for cell in cells)


def test_a_sampler_that_starts_again_gets_new_cells() -> None:
    cells = tally({"cond": "cscc"}, (1.0, 0.5, 1.0, 0.5)).cells("cond")
    assert [(cell.sigma, cell.skipped) for cell in cells] == [
        (1.0, 0), (0.5, 1), (1.0, 0), (0.5, 0),
    ]  # fmt: skip
