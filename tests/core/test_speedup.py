"""Speed-ups, and the threshold for one that is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_lab.core.cache.magcache import plan
from adapter_lab.core.cache.published import published
from adapter_lab.core.cache.speedup import for_speedup, speedup
from adapter_lab.core.errors import AdapterLabError
from hypothesis import given, settings
from hypothesis import strategies as st

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "magcache_vectors.json").read_text())
ratios = st.lists(st.floats(0.8, 1.25), min_size=8, max_size=30)


@pytest.mark.parametrize("row", VECTORS["schedules"], ids=lambda r: f"{r['model']}-{r['steps']}")
def test_published_speed_ups(row):
    branches = [row[name] for name in ("cond", "uncond") if name in row]
    skipped = sum(map(len, branches))
    made = speedup(skipped, row["steps"] * len(branches))
    assert made == pytest.approx(row["speed_up"], abs=0.006)  # given to two places


@pytest.mark.parametrize(("skipped", "steps"), [(-1, 5), (5, 5), (1, 0), (6, 5)])
def test_what_is_no_schedule(skipped, steps):
    with pytest.raises(AdapterLabError, match="out of range"):
        speedup(skipped, steps)


def of(name, steps, k=4, retention=0.2):
    return lambda threshold: plan(published(name).cond, steps, threshold, k, retention)


@pytest.mark.parametrize("wanted", [1.0, 1.3, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("name", ["flux_dev", "wan2.1_t2v_1.3B", "chroma"])
def test_the_most_that_is_not_faster(name, wanted):
    at = of(name, 30)
    threshold, skipped = for_speedup(wanted, at, 30)
    assert skipped == at(threshold)
    assert 30 / (30 - len(skipped)) <= wanted + 1e-9
    # No threshold of a fine grid comes closer from below.
    others = [len(at(i / 400)) for i in range(400)]
    assert len(skipped) >= max(n for n in others if 30 / (30 - n) <= wanted + 1e-9)


def test_the_lowest_of_the_thresholds_with_as_many():
    for wanted in (1.3, 1.5, 1.8):
        at = of("flux_dev", 30)
        threshold, skipped = for_speedup(wanted, at, 30)
        lower = [i / 4000 for i in range(4000) if i / 4000 < threshold * 0.95]
        assert all(len(at(one)) < len(skipped) for one in lower)


@pytest.mark.parametrize("name", ["chroma", "qwen_image_50"])
def test_the_fastest_there_is_takes_no_more_than_it_has_to(name):
    at = of(name, 30)
    reach = len(at(1e9))
    threshold, skipped = for_speedup(30 / (30 - reach), at, 30)
    least = next(i / 2000 for i in range(8000) if len(at(i / 2000)) == reach)
    assert len(skipped) == reach and threshold == pytest.approx(least, abs=0.0005)


def test_a_higher_threshold_may_skip_fewer():
    counts = {0.45: 9, 0.3: 5, 0.2: 8, 0.1: 3, 0.0: 0}

    def at(threshold):
        return list(range(next(n for least, n in counts.items() if threshold >= least)))

    threshold, skipped = for_speedup(10 / 4, at, 10)  # six may be skipped
    assert len(skipped) == 5 and threshold == 0.3


def test_an_exact_speed_up_is_met():
    flat = [1.0] + [0.9] * 29
    threshold, skipped = for_speedup(2.0, lambda t: plan(flat, 30, t, 9, 0.0, guard_last=False), 30)
    # 0.1 is the error of one skipped step, 0.29 that of two: between them it is every other.
    assert skipped == list(range(1, 30, 2)) and 0.0999 < threshold <= 0.29


def test_the_threshold_has_few_digits():
    threshold, _ = for_speedup(1.5, of("flux_dev", 28), 28)
    assert len(f"{threshold:g}".lstrip("0.")) <= 3


def test_none_skipped_is_threshold_zero():
    assert for_speedup(1.0, of("flux_dev", 28), 28) == (0.0, [])
    assert for_speedup(1.01, of("flux_dev", 28), 28) == (0.0, [])


def test_out_of_reach():
    # With k = 1 and nothing retained, of 30 steps the first, the last and every other is computed.
    with pytest.raises(AdapterLabError) as caught:
        for_speedup(3, of("flux_dev", 30, k=1, retention=0.0), 30)
    assert "found 1.88 at any threshold" in str(caught.value)  # 30 / 16


@pytest.mark.parametrize("wanted", [0.9, -2, float("nan"), float("inf")])
def test_no_speed_up(wanted):
    with pytest.raises(AdapterLabError, match="out of range"):
        for_speedup(wanted, of("flux_dev", 28), 28)


@settings(max_examples=25, deadline=None)
@given(ratios, st.integers(1, 6), st.floats(1.0, 2.5))
def test_any_ratios(values, k, wanted):
    steps = len(values)

    def at(threshold):
        return plan(values, steps, threshold, k, 0.1)

    most = steps / (steps - len(at(1e6)))
    if wanted > most + 1e-9:
        with pytest.raises(AdapterLabError, match="out of reach"):
            for_speedup(wanted, at, steps)
        return
    threshold, skipped = for_speedup(wanted, at, steps)
    assert at(threshold) == skipped and steps / (steps - len(skipped)) <= wanted + 1e-9
