"""The rule that says which steps are skipped, on cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.cache.branch import Branch
from adapter_lab.core.cache.magcache import Course, Rule, interpolated, plan, skipped
from adapter_lab.core.cache.published import Special
from adapter_lab.core.cache.trace import Trace
from adapter_lab.core.errors import AdapterLabError

FALLING = [1.0] + [0.97] * 11  # errors of a run: 0.03, 0.0891, 0.1764


def test_a_run_ends_at_the_threshold_and_at_its_longest():
    assert plan(FALLING, 12, 0.12, 4, 0.25) == [3, 4, 6, 7, 9, 10]
    assert plan(FALLING, 12, 0.12, 1, 0.25) == [3, 5, 7, 9]
    assert plan(FALLING, 12, 0.0891, 4, 0.25) == [3, 5, 7, 9]  # 0.03 + 0.0591 is not below
    assert plan(FALLING, 12, 0.12, 1, 0.25, guard_last=False) == [3, 5, 7, 9, 11]


def test_nothing_is_skipped_with_nothing_allowed():
    for threshold, k in ((0.0, 4), (0.12, 0)):
        assert plan(FALLING, 12, threshold, k, 0.25) == []


def test_growth_counts_as_shrinking_does():
    ratios = [1.0] + [1.05, 0.95] * 6  # |1 - 1.05| + |1 - 0.9975| + |1 - 1.047375|
    assert plan(ratios, 12, 0.0998, 9, 0.0, guard_last=False)[:3] == [1, 2, 4]
    assert plan(ratios, 12, 0.0999, 9, 0.0, guard_last=False)[:3] == [1, 2, 3]


def test_the_first_step_is_computed_even_without_retention():
    assert plan([1.0] * 10, 10, 1.0, 99, 0.0, guard_last=False) == list(range(1, 10))


def test_retention_of_each_expert():
    rule = Rule(1.0, 99, 0.2, False, Special(boundary=0.9))
    assert [i for i, r in enumerate(rule.reasons(20, 10)) if r] == [0, 1, 10, 11]
    closed = Rule(1.0, 99, 0.2, False, Special(boundary=0.9, high=False))
    assert [i for i, r in enumerate(closed.reasons(20, 10)) if r] == [*range(10), 10, 11]


def test_special_cases():
    assert Rule(1.0, 99, 1.0).reasons(2) == ["retention"] * 2  # the first reason that holds
    forced = Rule(1.0, 99, 0.0, False, Special(forced=(11, 28)))
    assert [i for i, r in enumerate(forced.reasons(28)) if r] == [0, 11]
    jump = [1.0, 1.0, 0.93, 1.0, 1.0]
    close = plan(jump, 5, 1.0, 9, 0.0, guard_last=False, special=Special(closest=0.06))
    assert close == [1, 3, 4]


def test_branches_of_one_batch_skip_only_together():
    rule = Rule(0.12, 4, 0.25)
    reasons = rule.reasons(12)
    courses = [Course(rule, ratios, reasons) for ratios in (FALLING, [1.0] * 12)]
    assert skipped(courses, 12) == [3, 4, 6, 7, 9, 10]


def test_between_the_steps_the_ratio_is_in_proportion():
    """Half a step has the square root of its ratio; both halves make the whole."""
    course = Course(Rule(1.0, 9, 0.0, False), FALLING, [""] * 12)
    course.wants(0.0)
    course.computed()
    for position, ratio in ((0.5, 0.97**0.5), (1.0, 0.97), (2.25, 0.97**2.25)):
        assert course.wants(position) and course.ratio == pytest.approx(ratio)


UNEVEN = [1.0, 0.9, 0.8, 0.6, 0.2]  # shares of the way, times 5: 0.5, 0.5, 1, 2, 1
BENDS = [9.0, 9.0, 2.0, 3.0, 5.0]


def extrapolating(*computed, threshold=99.0, sigmas=UNEVEN, bends=BENDS):
    """A course without a reason to compute, after these steps."""
    count = len(sigmas)
    rule = Rule(threshold, 9, 0.0, False)
    course = Course(rule, [1.0] * count, [""] * count, bends, sigmas)
    for position in computed:
        course.wants(position)
        course.computed()
    return course


def test_error_of_an_extrapolation():
    """share bend |s - s_a| |s - s_b|, summed over the run; the last step goes to 0."""
    course = extrapolating(0.0, 1.0, threshold=0.77)
    assert course.wants(2.0) and course.error == pytest.approx(2 * 0.2 * 0.1)
    assert course.wants(3.0) and course.error == pytest.approx(0.04 + 2 * 3 * 0.4 * 0.3)
    assert not course.wants(4.0) and course.error == pytest.approx(0.76 + 5 * 0.8 * 0.7)
    assert course.reason == "threshold"


def test_between_the_steps_an_extrapolation_has_the_share_of_the_step():
    for position, error in ((2.5, 2 * 0.3 * 0.2), (3.75, 2 * 5 * 0.7 * 0.6), (4.5, 5 * 0.9 * 0.8)):
        course = extrapolating(0.0, 1.0)
        assert course.wants(position) and course.error == pytest.approx(error)


def test_on_an_even_schedule_no_step_weighs_more():
    course = extrapolating(0.0, 1.0, sigmas=[10.0, 8.0, 6.0, 4.0, 2.0])
    assert course.wants(2.0) and course.error == pytest.approx(2 * 4 * 2)
    assert course.wants(3.0) and course.error == pytest.approx(16 + 3 * 6 * 4)


def test_with_one_residual_the_error_is_that_of_the_magnitude():
    """A repeat is no second one; going back makes that step the last."""
    course = extrapolating(0.0, 0.0)
    course.ratios = [0.9] * 5
    assert course.wants(1.0) and course.error == pytest.approx(0.1)
    course = extrapolating(0.0, 1.0, 0.0, 2.0)  # as a trace of two keeps it: 1 and 0.8
    assert course.wants(3.0) and course.error == pytest.approx(2 * 3 * 0.4 * 0.2)


def test_a_step_back_is_computed():
    course = Course(Rule(1.0, 9, 0.0, False), [1.0] * 12, [""] * 12)
    course.wants(4.0)
    course.computed()
    assert course.wants(5.0) and not course.wants(4.5) and course.reason == "step back"
    course.computed()
    assert course.wants(5.0)


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_bad_ratios(bad):
    with pytest.raises(AdapterLabError, match="magnitude ratios"):
        interpolated(bad, 5)


@pytest.mark.parametrize(
    "bad", [(-0.1, 4, 0.2), (math.nan, 4, 0.2), (0.1, -1, 0.2), (0.1, 4, 1.1), (0.1, 4, -0.1)]
)
def test_bad_settings(bad):
    with pytest.raises(AdapterLabError):
        plan(FALLING, 12, *bad)


def branch(k=9):
    made = Branch("cond", Trace(1))
    made.course = Course(Rule(1.0, k, 0.0, False), [1.0] * 12, [""] * 12)
    return made


def test_a_branch_repeats_its_decision_and_needs_a_residual():
    one = branch()
    assert not one.wants(1.0, 0.0) and one.reason == "nothing known"
    one.decided(False)
    one.trace.put(1.0, (torch.ones(1),))
    assert one.wants(0.9, 1.0)
    one.decided(False, "guard")
    assert not one.wants(0.9, 1.0) and one.reason == "guard"
    assert one.wants(0.8, 2.0)


def test_what_a_branch_computes_begins_a_new_run():
    """Also where others refuse the skip; a second visit counts for nothing."""
    one = branch(k=1)
    one.trace.put(1.0, (torch.ones(1),))
    one.wants(1.0, 0.0)
    one.decided(False)
    made = []
    for place in (1.0, 1.0, 2.0, 2.0, 3.0, 4.0):
        wanted = one.wants(1 - place / 12, place)
        one.decided(wanted and place != 3.0, "others of its batch")
        made.append((wanted, one.reason))
    alone, others = (False, "longest run"), (True, "others of its batch")
    assert made == [(True, ""), (True, ""), alone, alone, others, (True, "")]


def test_a_branch_that_starts_again_forgets():
    one = branch()
    one.wants(0.5, 6.0)
    one.decided(False)
    one.trace.put(0.5, (torch.ones(1),))
    assert not one.wants(0.6, 5.0) and one.trace.points  # one step back, as Heun++ does
    one.decided(False)
    assert not one.wants(1.0, 0.0) and not one.trace.points and one.trace.length == 1
    assert one.reason == "nothing known"  # a new start, not a step back


def test_change_of_the_input():
    one = branch()
    assert one.change(torch.ones(2)) == math.inf
    one.input = torch.tensor([3.0, 4.0])
    assert one.change(torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert one.change(torch.ones(3)) == math.inf
    one.input = torch.full((1 << 16,), 300.0, dtype=torch.float16)  # its norm is 76800
    assert one.change(one.input * 1.5) == pytest.approx(0.5)
    assert math.isnan(one.change(one.input * math.nan))  # no number is small enough for a guard
