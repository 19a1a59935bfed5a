"""A strength over the progress of sampling: text into points, linear between them."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.schedule import parse
from hypothesis import given
from hypothesis import strategies as st


def test_linear_between_points_and_constant_outside():
    schedule = parse("0@0.1, 1@0.3\n0.2@1")
    assert schedule.points == ((0.1, 0.0), (0.3, 1.0), (1.0, 0.2))
    assert [schedule.at(x) for x in (0, 0.1, 0.2, 0.3, 1)] == pytest.approx([0, 0, 0.5, 1, 0.2])
    assert schedule.constant is None


@pytest.mark.parametrize(
    ("text", "constant"), [("", 1), (" \n", 1), ("0.5", 0.5), ("-1@0.4", -1), ("2@0, 2@1", 2)]
)
def test_one_strength_throughout(text, constant):
    schedule = parse(text)
    assert schedule.constant == constant
    assert [schedule.at(x) for x in (0, 0.4, 1)] == [constant] * 3


def test_two_points_in_one_place_are_a_jump():
    schedule = parse("1@0, 1@0.5, 0@0.5")
    assert [schedule.at(x) for x in (0.499, 0.5, 1)] == [1, 0, 0]


@pytest.mark.parametrize(
    "text", ["a", "1@x", "1, 2", "1@2", "1@-0.1", "nan", "1@nan", "inf@0", "1@0.5, 2@0.5, 3@0.5"]
)
def test_bad_points_are_errors(text):
    with pytest.raises(AdapterLabError, match="schedule"):
        parse(text)


@given(
    st.dictionaries(st.floats(0, 1).filter(lambda x: x in (0, 1) or 1e-3 < x < 0.999),
                    st.floats(-4, 4), min_size=1, max_size=5),
    st.floats(0, 1),
)  # fmt: skip
def test_is_numpys_interpolation(points, progress):
    text = ",".join(f"{strength!r}@{at!r}" for at, strength in points.items())
    at = sorted(points)
    expected = np.interp(progress, at, [points[x] for x in at])
    assert parse(text).at(progress) == pytest.approx(expected, abs=1e-6)
