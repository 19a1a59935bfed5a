"""Places in a schedule, against counting by hand."""

from __future__ import annotations

import math

import pytest
from adapter_lab.core.cache.magcache import Rule
from adapter_lab.core.cache.published import Special
from adapter_lab.core.cache.timeline import RISING, Timeline, falling, placed
from hypothesis import given
from hypothesis import strategies as st

TEN = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
levels = st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True).map(
    lambda made: [*sorted((n / 1000 for n in made), reverse=True), 0.0]
)


@given(levels)
def test_every_step_is_at_its_own_place(sigmas: list[float]) -> None:
    timeline = Timeline.whole(sigmas)
    assert [timeline.position(s) for s in sigmas[:-1]] == list(range(len(sigmas) - 1))


@given(levels, st.floats(-1, 2000), st.floats(-1, 2000))
def test_less_noise_is_never_earlier(sigmas: list[float], one: float, two: float) -> None:
    timeline = Timeline.whole(sigmas)
    high, low = max(one, two), min(one, two)
    assert 0 <= timeline.position(high) <= timeline.position(low) < timeline.steps


@pytest.mark.parametrize(
    ("sigma", "place"),
    [(99.0, 0.0), (10.0, 0.0), (9.5, 0.5), (9.0, 1.0), (7.75, 2.25), (1.0, 9.0), (0.5, 9.5)],
)
def test_between_two_steps_it_is_linear_in_sigma(sigma: float, place: float) -> None:
    assert Timeline.whole(TEN).position(sigma) == place


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_the_end_is_still_in_the_last_step(sigma: float) -> None:
    assert int(Timeline.whole(TEN).position(sigma)) == 9


def test_a_sampler_that_misses_a_step_by_rounding_is_at_it() -> None:
    timeline = Timeline.whole(TEN)
    assert timeline.position(7.0 * (1 + 1e-6)) == 3.0
    assert timeline.position(7.0 * (1 - 1e-6)) == 3.0


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [5.0], [0.0, 0.0], [5.0, 0.0], [5.0, 5.0, 0.0], [math.nan, 1.0, 0.0]]
)
def test_no_list_of_sigmas_is_too_short(sigmas: list[float]) -> None:
    timeline = Timeline.whole(sigmas)
    assert timeline.steps == 1
    assert all(0 <= timeline.position(s) < 1 for s in (9.0, 5.0, 1.0, 0.0))


def test_repeated_noise_levels_count_once() -> None:
    assert Timeline.whole([4.0, 3.0, 3.0, 1.0, 0.0, 0.0]).sigmas == (4.0, 3.0, 1.0)
    assert falling([1.0, 3.0, 2.0, 3.0, math.inf, math.nan]) == [3.0, 2.0, 1.0]


def test_rising_noise_levels_are_told() -> None:
    assert Timeline.whole(TEN[::-1]).off == RISING
    assert Timeline.whole(TEN).off == ""
    assert Timeline.whole([4.0, 2.0, 3.0, 0.0]).off == ""
    assert Timeline.whole([0.0, 0.0]).off == ""


@pytest.mark.parametrize(
    ("part", "start", "stop", "cut"),
    [
        (TEN, 0, 10, False),
        (TEN[:5], 0, 4, False),
        (TEN[4:], 4, 10, False),
        (TEN[3:7], 3, 6, False),
        ([*TEN[:5], 0.0], 0, 5, True),
        ([*TEN[3:7], 0.0], 3, 7, True),
    ],
)
def test_a_part_is_found(part: list[float], start: int, stop: int, cut: bool) -> None:
    made = placed(part, TEN, "ten")
    assert made == Timeline(tuple(TEN[:-1]), start, stop, "ten", cut)


@pytest.mark.parametrize(
    "part", [[10.0, 8.0, 7.0], [9.5, 8.5, 0.0], [1.0, 0.0, -1.0], [*TEN, -1.0], [3.0, 1.5, 0.0]]
)
def test_what_is_no_part_is_not_found(part: list[float]) -> None:
    assert placed(part, TEN) is None


def test_the_second_expert_begins_where_the_run_stops_or_starts() -> None:
    sigmas = tuple(1 - i / 10 for i in range(10))
    assert Timeline(sigmas, 0, 10).split(0.75) == 3  # 1, 0.9 and 0.8 are above it
    assert Timeline(sigmas, 0, 4).split(0.75) == 4
    assert Timeline(sigmas, 4, 10).split(0.75) == 4
    assert Timeline(sigmas, 2, 5).split(0.75) == 2  # 0.8 is nearer than 0.5
    assert Timeline(sigmas, 0, 10).split(0.8) == 3  # the boundary is the first one's
    assert Timeline(sigmas, 0, 10).split(0.05) is None
    assert Timeline(sigmas, 0, 10).split(2.0) is None


def test_reasons_of_two_experts_are_counted_in_each() -> None:
    rule = Rule(0.1, 4, 0.5, special=Special(boundary=0.75, high=False))
    timeline = Timeline(tuple(1 - i / 10 for i in range(10)), 4, 10)
    high, low = ["high-noise expert"] * 4, ["retention"] * 3 + [""] * 2 + ["last step"]
    assert timeline.reasons(rule) == [*high, *low]


def test_steps_outside_the_range_are_computed() -> None:
    made = Timeline.whole(TEN).reasons(Rule(0.1, 4, 0.1), highest=8.0, lowest=3.0)
    assert made == [
        "retention", "outside the range", *[""] * 5, *["outside the range"] * 2, "last step",
    ]  # fmt: skip


def test_a_run_that_goes_to_nothing_early_guards_its_own_last_step() -> None:
    timeline, rule = placed([*TEN[:6], 0.0], TEN), Rule(0.1, 4, 0.1)
    assert timeline is not None
    made = timeline.reasons(rule)
    assert [t for t, reason in enumerate(made) if reason == "last step"] == [5, 9]
    assert timeline.reasons(Rule(0.1, 4, 0.6))[5] == "retention"
    free = Rule(0.1, 4, 0.1, guard_last=False)
    assert "last step" not in timeline.reasons(free)
