"""Calibrations: resampled to other schedules, written and read, and files that are none."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest
from adapter_lab.core.cache.calibration import (
    Calibration,
    Curve,
    read_calibration,
    write_calibration,
)
from adapter_lab.core.errors import AdapterLabError
from hypothesis import given, settings
from hypothesis import strategies as st

SIGMAS = (1.0, 0.8, 0.5, 0.2)
RATIOS = (1.0, 0.9, 1.2, 0.5)
CURVE = Curve(SIGMAS, RATIOS, (0.0, 0.01, 0.02, 0.03), (0.0, 1e-5, 1e-4, 0.1), (4.0, 4.0, 2.0, 9.0))
ONE = Calibration("0123abcd", "blocks", "flux", 4, {"cond": CURVE}, {"sampler": "euler"})


@st.composite
def curves(draw):
    count = draw(st.integers(2, 30))
    gaps = draw(st.lists(st.floats(1e-3, 2.0), min_size=count, max_size=count))
    sigmas = [math.fsum(gaps[i:]) for i in range(count)]
    ratios = draw(st.lists(st.floats(0.2, 5.0), min_size=count - 1, max_size=count - 1))
    bends = draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
    none = (0.0,) * count
    return Curve(tuple(sigmas), (1.0, *ratios), none, none, tuple(bends))


def of(curve, **more):
    return replace(ONE, curves={"cond": curve}, **more)


def test_between_levels_by_hand():
    # log ||r||: 0, log .9, log 1.08, log .54 at 1, .8, .5, .2
    sigmas = [1.0, 0.9, 0.65, 0.2]
    half = math.sqrt(0.9)
    there = 0.9 * math.sqrt(1.2)
    assert ONE.ratios("cond", sigmas) == pytest.approx([1.0, half, there / half, 0.54 / there])
    assert ONE.bends("cond", sigmas) == pytest.approx([4.0, 4.0, 3.0, 9.0])


def test_beyond_the_levels_the_slope_goes_on():
    # From 1 to 0.8 by 0.9, so from 1.2 to 1 as well; from 0.5 to 0.2 by 0.5, so from 0.2 to 0.05
    # by the square root of that.
    sigmas = [1.2, 1.0, 0.2, 0.05]
    assert ONE.ratios("cond", sigmas) == pytest.approx([1.0, 0.9, 0.54, math.sqrt(0.5)])
    assert ONE.bends("cond", sigmas) == [4.0, 4.0, 9.0, 9.0]


def test_far_beyond_it_stays_a_number():
    made = ONE.ratios("cond", [1e6, 1.0, 1e-6])
    assert all(0 < ratio < math.inf for ratio in made)


@given(curves())
def test_on_its_own_levels_it_gives_its_ratios(curve):
    found = of(curve)
    assert found.ratios("cond", curve.sigmas) == pytest.approx(curve.ratios, rel=1e-6)
    assert found.bends("cond", curve.sigmas) == pytest.approx(curve.bends, abs=1e-9)


@given(curves(), st.data())
def test_finer_schedules_keep_the_product_over_any_interval(curve, data):
    sigmas = curve.sigmas
    between = [(a + b) / 2 for a, b in zip(sigmas, sigmas[1:], strict=False)]
    finer = sorted({*sigmas, *between}, reverse=True)
    made = dict(zip(finer, of(curve).ratios("cond", finer), strict=True))
    first = data.draw(st.integers(0, len(sigmas) - 2))
    last = data.draw(st.integers(first + 1, len(sigmas) - 1))
    within = [ratio for sigma, ratio in made.items() if sigmas[last] <= sigma < sigmas[first]]
    assert math.prod(within) == pytest.approx(math.prod(curve.ratios[first + 1 : last + 1]))


@given(curves(), st.lists(st.floats(0.0, 1.0), min_size=2, max_size=40, unique=True))
def test_any_schedule_multiplies_to_the_same(curve, places):
    high, low = curve.sigmas[0], curve.sigmas[-1]
    sigmas = sorted({low + place * (high - low) for place in places} | {high, low}, reverse=True)
    made = of(curve).ratios("cond", sigmas)
    assert made[0] == 1 and len(made) == len(sigmas)
    assert math.prod(made) == pytest.approx(math.prod(curve.ratios))


def test_a_branch_that_was_not_measured_goes_by_the_other():
    other = replace(CURVE, ratios=(1.0, 0.5, 0.5, 0.5))
    both = replace(ONE, curves={"cond": CURVE, "uncond": other})
    assert both.ratios("uncond", SIGMAS) == pytest.approx([1.0, 0.5, 0.5, 0.5])
    assert ONE.ratios("uncond", SIGMAS) == ONE.ratios("cond", SIGMAS)
    alone = replace(ONE, curves={"uncond": other})
    assert alone.ratios("cond", SIGMAS) == pytest.approx([1.0, 0.5, 0.5, 0.5])


def test_bends_that_were_not_measured():
    assert of(replace(CURVE, bends=())).bends("cond", SIGMAS) == []


def test_a_file_reads_as_it_was_written(tmp_path):
    path = tmp_path / "folder" / "flux.json"
    uncond = replace(CURVE, sigmas=(14.614642, 14.614641, 3.0, 0.0291675), bends=())
    whole = replace(ONE, curves={"cond": CURVE, "uncond": uncond})
    write_calibration(path, whole)
    assert read_calibration(path) == whole
    assert [entry.name for entry in path.parent.iterdir()] == ["flux.json"]


@settings(max_examples=25, deadline=None)
@given(curves())
def test_rounding_in_the_file_is_below_a_millionth(tmp_path_factory, curve):
    path = tmp_path_factory.mktemp("calibration") / "a.json"
    write_calibration(path, of(curve))
    found = read_calibration(path)
    assert found.curves["cond"].sigmas == pytest.approx(curve.sigmas, rel=1e-8)
    assert found.curves["cond"].ratios == pytest.approx(curve.ratios, rel=6e-6)


def test_the_file_is_for_people(tmp_path):
    path = tmp_path / "a.json"
    third = replace(CURVE, ratios=(1.0, 1 / 3, 2 / 3, 1e-4 / 3))
    write_calibration(path, of(third))
    text = path.read_text()
    given = json.loads(text)
    assert given["version"] == 1 and given["about"] == {"sampler": "euler"}
    assert given["curves"]["cond"]["ratios"] == [1.0, 0.333333, 0.666667, 3.33333e-05]
    assert len(text.splitlines()) < 25 and max(map(len, text.splitlines())) < 200


def test_a_thousand_steps_are_small(tmp_path):
    count = 1000
    sigmas = tuple(1 - i / count for i in range(count))
    numbers = tuple(0.9123456789 + i / 1e7 for i in range(count))
    curve = Curve(sigmas, (1.0, *numbers[1:]), numbers, numbers, numbers)
    path = tmp_path / "a.json"
    write_calibration(path, replace(ONE, curves={"cond": curve, "uncond": curve}))
    assert len(read_calibration(path).curves["uncond"].sigmas) == count
    assert path.stat().st_size < 1 << 20


def changed(**changes):
    """The file's content with some of it replaced; None: left out; of the curve's lists as well."""
    curve = {name: list(getattr(CURVE, name)) for name in CURVE.__dataclass_fields__}
    whole = {
        "format": "adapter_lab.magcache", "version": 1, "fingerprint": "0123abcd",
        "level": "blocks", "architecture": "flux", "steps": 4, "about": {},
    }  # fmt: skip
    for name, value in changes.items():
        (curve if name in curve else whole)[name] = value
    whole = {"curves": {"cond": curve}} | whole
    return {name: value for name, value in whole.items() if value is not None}


def test_what_is_changed_below_is_fine_before(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed()))
    assert read_calibration(path) == replace(ONE, about={})


NAN, INF = float("nan"), float("inf")
ODD = {
    "no format": changed(format=None),
    "another format": changed(format="workflow"),
    "no version": changed(version=None),
    "newer": changed(version=2),
    "version as text": changed(version="1"),
    "version true": changed(version=True),
    "no fingerprint": changed(fingerprint=None),
    "fingerprint a number": changed(fingerprint=12),
    "fingerprint long": changed(fingerprint="f" * 201),
    "fingerprint of two lines": changed(fingerprint="a\nb"),
    "half a letter": changed(fingerprint="\ud800"),
    "unknown level": changed(level="layers"),
    "no level": changed(level=None),
    "no architecture": changed(architecture=None),
    "no steps": changed(steps=None),
    "no step": changed(steps=0),
    "half a step": changed(steps=2.5),
    "steps true": changed(steps=True),
    "many steps": changed(steps=10**4000),
    "no about": changed(about=None),
    "about a list": changed(about=[]),
    "about numbers": changed(about={"size": 3}),
    "about long": changed(about={"a": "x" * 201}),
    "about a long name": changed(about={"x" * 201: "a"}),
    "about much": changed(about={str(i): "" for i in range(65)}),
    "no curves": changed(curves=None),
    "curves a list": changed(curves=[]),
    "curves empty": changed(curves={}),
    "unknown branch": changed(curves={"middle": changed()["curves"]["cond"]}),
    "curve a list": changed(curves={"cond": [1, 2]}),
    "curve empty": changed(curves={"cond": {}}),
    "no ratios": changed(ratios=None),
    "a ratio less": changed(ratios=[1.0, 0.9, 0.8]),
    "a ratio more": changed(ratios=[1.0, 0.9, 0.8, 0.7, 0.6]),
    "ratio zero": changed(ratios=[1.0, 0.9, 0.0, 0.8]),
    "ratio negative": changed(ratios=[1.0, 0.9, -0.5, 0.8]),
    "ratio nan": changed(ratios=[1.0, 0.9, NAN, 0.8]),
    "ratio infinite": changed(ratios=[1.0, 0.9, INF, 0.8]),
    "ratio huge": changed(ratios=[1.0, 0.9, 10**400, 0.8]),
    "ratio text": changed(ratios=[1.0, 0.9, "0.8", 0.8]),
    "ratio null": changed(ratios=[1.0, 0.9, None, 0.8]),
    "ratio true": changed(ratios=[1.0, 0.9, True, 0.8]),
    "ratio a list": changed(ratios=[1.0, 0.9, [0.8], 0.8]),
    "first ratio": changed(ratios=[0.9, 0.9, 0.8, 0.7]),
    "rising": changed(sigmas=[0.2, 0.5, 0.8, 1.0]),
    "standing": changed(sigmas=[1.0, 0.5, 0.5, 0.2]),
    "below zero": changed(sigmas=[1.0, 0.5, 0.2, -0.1]),
    "sigma nan": changed(sigmas=[1.0, NAN, 0.5, 0.2]),
    "sigma infinite": changed(sigmas=[INF, 0.8, 0.5, 0.2]),
    "one level": changed(sigmas=[1.0], ratios=[1.0], spread=[0.0], cosine=[0.0], bends=[]),
    "no level at all": changed(sigmas=[], ratios=[], spread=[], cosine=[], bends=[]),
    "spread negative": changed(spread=[0, 0, -1, 0]),
    "cosine nan": changed(cosine=[0, 0, NAN, 0]),
    "cosine too large": changed(cosine=[0, 0, 3, 0]),
    "bends negative": changed(bends=[0, 0, -1, 0]),
    "bends infinite": changed(bends=[0, 0, INF, 0]),
    "bends less": changed(bends=[1.0, 2.0]),
    "bends a number": changed(bends=3.0),
    "a list": [1, 2, 3],
    "a text": "calibration",
    "nothing": None,
}


def refused(path):
    with pytest.raises(AdapterLabError) as caught:
        read_calibration(path)
    said = str(caught.value)
    assert said.startswith(f"Cannot read the calibration '{path.name}': ") and len(said) < 600
    assert "\n" not in said and said.encode()
    return said


@pytest.mark.parametrize("given", ODD.values(), ids=ODD.keys())
def test_odd_files_are_refused(given, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(given))
    assert "it is " in refused(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\x00\xff\xfe" * 9, "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "it is"),
        (json.dumps(changed()).encode()[:-30], "no JSON"),
        (json.dumps(changed()).encode() + b" " * (1 << 20), "too large: expected 1 MB at most"),
    ],
)
def test_bytes_that_are_no_calibration(data, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert said in refused(path)


def test_no_file(tmp_path):
    assert "No such file" in refused(tmp_path / "gone.json")
    assert "it is no file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    assert "it is no file" in refused(tmp_path / "pipe.json")


def test_messages_say_what_and_where(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ODD["ratio nan"]))
    assert "nan at place 3 of ratios" in refused(path)
    path.write_text(json.dumps(ODD["newer"]))
    assert "found version 2, expected version 1. Calibrate again" in refused(path)
    path.write_text(json.dumps(ODD["a ratio less"]))
    assert "ratios has 3 numbers, expected 4" in refused(path)


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 700))
def test_damage_is_refused_or_harmless(tmp_path_factory, damage, place):
    path = tmp_path_factory.mktemp("calibration") / "a.json"
    data = json.dumps(changed()).encode()
    path.write_bytes(data[:place] + damage + data[place + len(damage) :])
    try:
        found = read_calibration(path)
    except AdapterLabError as error:
        assert str(error)
    else:
        ratios = found.ratios("cond", SIGMAS)
        assert all(0 < ratio < math.inf for ratio in ratios)


def test_one_that_is_not_to_be_read_is_not_made():
    for changes in ({"level": "x"}, {"steps": 0}, {"curves": {}}, {"about": {"a": "b\nc"}}):
        with pytest.raises(AdapterLabError):
            replace(ONE, **changes)


def test_writing_fails_plainly(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(AdapterLabError, match="it is a folder"):
        write_calibration(tmp_path / "a.json", ONE)
