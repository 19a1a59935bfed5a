"""Schedules before sampling, by numbers worked out by hand."""

from __future__ import annotations

import pytest
from adapter_lab.core.cache.calibration import Calibration, Curve
from adapter_lab.core.cache.known import Lists
from adapter_lab.core.cache.magcache import Rule, plan
from adapter_lab.core.cache.planned import faster, numbers_for, planned
from adapter_lab.core.cache.published import published

STEPS = 10
SIGMAS = tuple(1 - t / STEPS for t in range(STEPS))


def calibration(bends=()):
    """An even schedule, residuals that never change their size."""
    flat = (1.0,) * STEPS
    curve = Curve(SIGMAS, flat, (0.0,) * STEPS, (0.0,) * STEPS, bends)
    return Calibration("f", "blocks", "flux", STEPS, {"cond": curve}, {})


def test_a_list_is_planned_as_it_is_sampled():
    one = published("wan2.1_t2v_1.3B")
    numbers = numbers_for(Lists({b: one.branch(b) for b in ("cond", "uncond")}), 30, bends=True)
    made = planned("Wan", numbers, Rule(0.12, 4, 0.2))
    assert made.errors == "magnitude" and set(made.branches) == {"cond", "uncond"}
    for branch, steps in made.branches.items():
        wanted = plan(one.branch(branch), 30, 0.12, 4, 0.2)
        assert [t for t, step in enumerate(steps) if not step.reason] == wanted


def test_errors_of_extrapolation_are_bends_times_both_distances():
    """With bends of 10 the first step of a run is off by 10 x 0.1 x 0.2, the second by 10 x 0.2 x
    0.3 more; where the last two computed ones are further apart, 10 x 0.1 x (0.1 + gap)."""
    numbers = numbers_for(calibration((10.0,) * STEPS), STEPS, bends=True)
    made = planned("mine", numbers, Rule(0.85, 4, 0.2))
    steps = made.branches["cond"]
    assert made.errors == "extrapolation" and numbers.errors == "extrapolation"
    assert [step.error for step in steps[2:5]] == pytest.approx([0.2, 0.8, 2.0])
    assert [t for t, step in enumerate(steps) if not step.reason] == [2, 3, 5, 7]
    assert steps[5].error == pytest.approx(10 * 0.1 * 0.4)
    assert planned("mine", numbers, Rule(0.85, 4, 0.2)).together == [2, 3, 5, 7]


def test_without_bends_sizes_alone_decide():
    numbers = numbers_for(calibration(), STEPS, bends=True)
    assert numbers.errors == "magnitude"
    assert planned("mine", numbers, Rule(0.01, 20, 0.1)).together == [*range(1, 9)]


def test_the_threshold_for_a_wished_speed():
    """Every other step needs 10 x 0.1 x 0.3, and the threshold has to be above."""
    numbers = numbers_for(calibration((10.0,) * STEPS), STEPS, bends=True)
    found = faster(numbers, Rule(0.0, 4, 0.2), 10 / 6)
    assert numbers.together(found) == [2, 4, 6, 8]
    assert found.threshold == pytest.approx(0.3) and found.threshold > 0.3
