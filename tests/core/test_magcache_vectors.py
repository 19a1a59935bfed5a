"""The skipped steps: published vectors, and small schedules worked out by hand."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from adapter_lab.core.cache import magcache
from adapter_lab.core.cache.magcache import interpolated, plan
from adapter_lab.core.cache.published import Special, names, published
from adapter_lab.core.errors import AdapterLabError

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "magcache_vectors.json").read_text())
SCHEDULES = VECTORS["schedules"]
TENTH = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]


def test_the_example_in_the_docs():
    assert doctest.testmod(magcache) == (0, 1)  # failed, tried


def test_there_are_vectors_for_many_models():
    assert len(SCHEDULES) == 50
    assert {row["model"] for row in SCHEDULES} <= set(names())


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: f"{row['model']}-{row['steps']}")
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_published_schedules(row, branch):
    found = published(row["model"])
    settings = row["steps"], row["threshold"], row["K"], row["retention"]
    made = plan(found.branch(branch), *settings, guard_last=False)
    # Where a model has one list, it is that of both branches.
    assert made == row.get(branch, row["cond"])


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: f"{row['model']}-{row['steps']}")
def test_the_last_step_is_guarded(row):
    ratios = published(row["model"]).cond
    made = plan(ratios, row["steps"], row["threshold"], row["K"], row["retention"])
    assert made == [step for step in row["cond"] if step < row["steps"] - 1]


# |1 - R| of a run at a ratio of 0.9: 0.1, 0.19, 0.271, ...; summed 0.1, 0.29, 0.561, 0.9049, ...
@pytest.mark.parametrize(
    ("threshold", "k", "retention", "skipped"),
    [
        (0.0, 9, 0.0, []),
        (0.05, 9, 0.0, []),
        (0.11, 9, 0.0, [1, 3, 5, 7]),
        (0.28, 9, 0.0, [1, 3, 5, 7]),
        (0.30, 9, 0.0, [1, 2, 4, 5, 7]),
        (0.60, 9, 0.0, [1, 2, 3, 5, 6, 7]),
        (99.0, 9, 0.0, [1, 2, 3, 4, 5, 6, 7]),
        (99.0, 0, 0.0, []),
        (99.0, 1, 0.0, [1, 3, 5, 7]),
        (99.0, 3, 0.0, [1, 2, 3, 5, 6, 7]),
        (99.0, 9, 0.5, [4, 5, 6, 7]),
        (99.0, 9, 0.49, [3, 4, 5, 6, 7]),  # int(8 * 0.49) = 3
        (99.0, 9, 1.0, []),
    ],
)
def test_by_hand(threshold, k, retention, skipped):
    settings = 8, threshold, k, retention
    assert plan(TENTH, *settings, guard_last=False) == skipped
    assert plan(TENTH, *settings) == [step for step in skipped if step != 7]


def test_errors_of_the_run_add_up_and_may_cancel_nothing():
    # R: 1.1, 0.99, 1.0395; |1 - R|: 0.1, 0.01, 0.0395; summed 0.1, 0.11, 0.1495
    ratios = [1.0, 1.1, 0.9, 1.05, 1.0]
    assert plan(ratios, 5, 0.1494, 9, 0.0, guard_last=False) == [1, 2, 4]
    assert plan(ratios, 5, 0.1496, 9, 0.0, guard_last=False) == [1, 2, 3]


def test_the_error_has_to_stay_below_the_threshold():
    assert plan([1.0, 1.5, 1.0], 3, 0.5, 9, 0.0, guard_last=False) == [2]  # |1 - 1.5| = 0.5 exactly
    assert plan([1.0, 1.5, 1.0], 3, 0.5000001, 9, 0.0, guard_last=False) == [1]


# round(t (L - 1) / (n - 1)), halves to even
@pytest.mark.parametrize(
    ("length", "steps", "nearest"),
    [
        (4, 4, [0, 1, 2, 3]),
        (4, 1, [3]),
        (4, 2, [0, 3]),
        (4, 3, [0, 2, 3]),  # 1.5 -> 2
        (4, 7, [0, 0, 1, 2, 2, 2, 3]),  # 0.5 -> 0, 1, 1.5 -> 2, 2, 2.5 -> 2
        (6, 3, [0, 2, 5]),  # 2.5 -> 2
        (1, 3, [0, 0, 0]),
    ],
)
def test_other_numbers_of_steps(length, steps, nearest):
    # A step of the list is told by its ratio: the ones that a run of one may skip are below 1.1.
    for chosen in range(length):
        ratios = [2.0] * length
        ratios[chosen] = 1.0
        made = plan(ratios, steps, 0.5, 1, 0.0, guard_last=False)
        assert made == _alternating([t for t in range(1, steps) if nearest[t] == chosen])


@pytest.mark.parametrize("length", [20, 25, 26, 28, 30, 40, 50])
def test_nearest_is_that_of_the_published_scripts(length):
    """In their order of operations: of 30 at 15 steps, that rounds 14.5 to the odd side."""
    own = np.arange(1.0, length + 1)
    for steps in range(2, 101):
        scale = (length - 1) / (steps - 1)
        expected = own[np.round(np.arange(steps) * scale).astype(int)]
        assert interpolated(own.tolist(), steps) == expected.tolist()


def _alternating(steps: list[int]) -> list[int]:
    """Of neighbours, every other: the longest run is one step."""
    made: list[int] = []
    for step in steps:
        if not made or made[-1] != step - 1:
            made.append(step)
    return made


def test_a_forced_step_is_computed_and_starts_anew():
    special = Special(forced=(2, 5))
    flat = [1.0] * 5
    assert plan(flat, 5, 1.0, 9, 0.0, guard_last=False, special=special) == [1, 3, 4]
    assert plan(flat, 9, 1.0, 9, 0.0, guard_last=False, special=special) == [1, 2, 6, 7, 8]


def test_an_own_ratio_too_far_from_one_is_computed():
    special = Special(closest=0.06)
    ratios = [1.0, 0.95, 0.93, 0.95, 1.07, 1.05]
    assert plan(ratios, 6, 9.0, 9, 0.0, guard_last=False, special=special) == [1, 3, 5]


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -0.9], [1.0, float("nan")], [float("inf")]])
def test_what_are_no_ratios(bad):
    with pytest.raises(AdapterLabError, match="no magnitude ratios"):
        plan(bad, 5, 0.1, 2, 0.2)


@pytest.mark.parametrize(
    "settings",
    [(0, 0.1, 2, 0.2), (5, -0.1, 2, 0.2), (5, 0.1, -1, 0.2), (5, 0.1, 2, 1.1),
     (5, float("nan"), 2, 0.2)],
)  # fmt: skip
def test_settings_out_of_range(settings):
    with pytest.raises(AdapterLabError, match="out of range"):
        plan([1.0] * 5, *settings)
