"""Calibrations of parts of a schedule made one, and settings that are left open."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from adapter_lab.core.cache.calibration import Calibration, Curve
from adapter_lab.core.cache.joined import covers, joined, span
from adapter_lab.core.cache.known import Lists, advice, listed, rule_for
from adapter_lab.core.cache.published import PLAIN, published
from adapter_lab.core.errors import AdapterLabError
from hypothesis import given
from hypothesis import strategies as st

STEPS = 20


def norm(sigma, scale=1.0):
    """Of a residual: log ||r|| is linear in sigma."""
    return math.exp(scale * sigma)


def curve(first, last, scale=1.0, bend=2.0, steps=STEPS):
    """Measured at every 1 / steps from ``first`` down to ``last``."""
    sigmas = [i / steps for i in range(round(first * steps), round(last * steps) - 1, -1)]
    norms = [norm(s, scale) for s in sigmas]
    ratios = [1.0, *(b / a for a, b in zip(norms, norms[1:], strict=False))]
    others = [(value,) * len(sigmas) for value in (0.1, 0.2, bend)]
    return Curve(tuple(sigmas), tuple(ratios), *others)


def calibration(**curves):
    return Calibration("f", "blocks", "flux", STEPS, curves)


places = st.integers(0, STEPS - 1)


@given(places, places, places, places)
def test_parts_of_one_curve_give_the_curve(a, b, c, d):
    """Wherever they overlap or leave a gap: the slope is the same all over."""
    (low, high), (start, stop) = sorted((a, b + 1)), sorted((c, d + 1))
    if high - low < 1 or stop - start < 1:
        return
    old, new = curve(high / STEPS, low / STEPS), curve(stop / STEPS, start / STEPS)
    made = joined(calibration(cond=old), calibration(cond=new)).curves["cond"]
    assert set(made.sigmas) == {*old.sigmas, *new.sigmas}
    exact = [norm(s) / norm(made.sigmas[0]) for s in made.sigmas]
    for sigma, ratio, before in zip(made.sigmas[1:], made.ratios[1:], made.sigmas, strict=False):
        assert ratio == pytest.approx(norm(sigma) / norm(before))
    assert math.prod(made.ratios) == pytest.approx(exact[-1])
    assert set(made.spread) == {0.1} and set(made.cosine) == {0.2} and set(made.bends) == {2.0}


def test_new_values_replace_old_ones_and_leave_the_rest():
    old, new = curve(1.0, 0.05, scale=1.0, bend=1.0), curve(0.7, 0.4, scale=3.0, bend=5.0)
    made = joined(calibration(cond=old), calibration(cond=new)).curves["cond"]
    assert made.sigmas == old.sigmas
    place = made.sigmas.index(0.7)
    inside = slice(place + 1, place + 7)
    assert made.ratios[inside] == new.ratios[1:] and made.bends[place : place + 7] == (5.0,) * 7
    assert made.ratios[:place] == old.ratios[:place]
    assert made.ratios[place + 8 :] == old.ratios[place + 8 :]
    # On the way from one to the other, what both make of a step of 0.05: the geometric mean.
    assert made.ratios[place] == pytest.approx(math.exp(-0.05 * (1 + 3) / 2))
    assert made.ratios[place + 7] == pytest.approx(math.exp(-0.05 * (1 + 3) / 2))


def test_what_the_first_level_of_a_run_can_not_tell_is_that_of_its_second():
    """At the first there is nothing to compare with, so that a run has 0 there."""
    old, new = curve(1.0, 0.5), curve(0.45, 0.1)
    new = replace(new, spread=(0.0, *new.spread[1:]), cosine=(0.0, *new.cosine[1:]))
    made = joined(calibration(cond=old), calibration(cond=new)).curves["cond"]
    assert set(made.spread) == {0.1} and set(made.cosine) == {0.2}


def test_the_same_noise_levels_are_measured_anew():
    """Also where float32 has moved them by a digit."""
    old, new = curve(1.0, 0.5), curve(1.0, 0.5, scale=2.0)
    moved = Curve(tuple(s * (1 + 1e-7) for s in new.sigmas), *(
        getattr(new, name) for name in ("ratios", "spread", "cosine", "bends")))  # fmt: skip
    assert joined(calibration(cond=old), calibration(cond=moved)).curves["cond"] == moved


def test_a_branch_that_one_of_them_lacks_is_that_of_the_other():
    one, two = curve(1.0, 0.5), curve(0.5, 0.1)
    made = joined(calibration(cond=one, uncond=one), calibration(cond=two))
    assert made.curves["uncond"] == one and len(made.curves["cond"].sigmas) == 19
    assert joined(calibration(cond=one), calibration(uncond=two)).curves == {
        "cond": one,
        "uncond": two,
    }


def test_bends_that_one_of_them_lacks_are_those_of_the_other():
    one = curve(1.0, 0.5)
    without = Curve(*(getattr(one, n) for n in ("sigmas", "ratios", "spread", "cosine")))
    made = joined(calibration(cond=without), calibration(cond=curve(0.4, 0.1)))
    assert set(made.curves["cond"].bends) == {2.0}
    assert joined(calibration(cond=without), calibration(cond=without)).bends("cond", [0.7]) == []


@pytest.mark.parametrize("sigmas, is_covered", [
    ([1.0, 0.9, 0.8, 0.7], True), ([0.8, 0.7], True), ([0.6, 0.5, 0.4, 0.3], False),
    ([1.0, 0.8, 0.6, 0.4], True),  # one beyond, where the edge holds
    ([i / 40 for i in range(40, 0, -1)], False),
    ([1 - 0.5 * i / 29 for i in range(30)], True),  # 3 of 30
])  # fmt: skip
def test_what_a_calibration_covers(sigmas, is_covered):
    made = calibration(cond=curve(1.0, 0.55), uncond=curve(0.8, 0.6))
    assert span(made) == (1.0, 0.55) and covers(made, sigmas) == is_covered


def test_lists_are_by_the_number_of_the_step():
    lists = Lists({"cond": (1.0, 0.9, 0.8), "uncond": (1.0, 0.5, 0.25)})
    assert lists.ratios("uncond", [9, 8, 7, 6, 5]) == [1.0, 1.0, 0.5, 0.25, 0.25]
    assert lists.bends("cond", [1.0]) == ()


def test_open_settings_are_the_first_recommended():
    found = listed(published("wan2.1_t2v_14B"))  # E 0.24, K 6, R 0.2: its README
    rule = rule_for({"threshold": None, "k": -1, "retention": 0.4}, found, guard_last=False)
    assert (rule.threshold, rule.k, rule.retention, rule.guard_last) == (0.24, 6, 0.4, False)
    assert rule_for({}, listed(published("flux_dev"))).special.forced == (11, 28)
    general = rule_for({}, None)
    assert (general.threshold, general.k, general.retention) == (0.09, 4, 0.2)
    assert general.special == PLAIN


def test_recommended_thresholds_are_not_for_errors_of_extrapolation():
    found = listed(published("wan2.1_t2v_14B"))
    rule = rule_for({}, found, "extrapolation")
    assert (rule.threshold, rule.k, rule.retention) == (0.08, 4, 0.2)


@pytest.mark.parametrize("given, name", [
    ({"threshold": math.nan}, "threshold"), ({"threshold": -0.1}, "threshold"), ({"k": -2}, "k"),
    ({"retention": 1.01}, "retention"), ({"k": math.inf}, "k"),
])  # fmt: skip
def test_settings_out_of_range_are_named(given, name):
    with pytest.raises(AdapterLabError, match=f"'{name}' is out of range"):
        rule_for(given, None)
    with pytest.raises(AdapterLabError, match="errors"):
        rule_for({}, None, "guesses")


def test_advice_names_what_was_not_chosen():
    found = listed(published("wan2.1_i2v_480p_14B"))  # quality E .12 K 4, fast E .24 K 6, R .2
    assert advice({}, found) == (
        "Set for quality (threshold 0.12, k 4, retention 0.2); for speed its authors recommend "
        "threshold 0.24, k 6, retention 0.2"
    )
    assert "k 6" in advice({"threshold": 0.1}, found) and "thresh" not in advice(
        {"threshold": 0.1}, found
    )
    assert advice({"threshold": 0.1, "k": 2}, found) == ""  # both recommend the same retention
    assert advice({}, listed(published("flux_dev"))) == ""
