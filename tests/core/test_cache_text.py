"""Ratios as people type or paste them."""

from __future__ import annotations

import pytest
from adapter_lab.core.cache.text import parse_ratios
from adapter_lab.core.errors import AdapterLabError
from hypothesis import given
from hypothesis import strategies as st

ONE = (1.0, 0.98, 1.02)
TWO = (1.0, 0.5, 2.0)
positive = st.floats(1e-300, 1e300)


@pytest.mark.parametrize(
    "text",
    [
        "1, 0.98, 1.02", "1 0.98 1.02", "1\n0.98\r\n1.02\n", "[1.0, .98, 1.02]",
        "((1.;9.8e-1;1.02,))",
        "\t1.0,\n\n 0.98 ,+1.02,", "cond: 1 0.98 1.02", "COND = [1, 0.98, 1.02]",
        "uncond: 1 0.98 1.02",
    ],
)  # fmt: skip
def test_one_list_is_for_both_branches(text):
    assert parse_ratios(text) == {"cond": ONE, "uncond": ONE}


@pytest.mark.parametrize(
    "text",
    [
        "cond: 1, 0.98, 1.02\nuncond: 1, 0.5, 2", "uncond=[1 0.5 2] cond=[1 0.98 1.02]",
        "Cond:1,.98,1.02;Uncond:1,.5,2", '{cond: [1, 0.98, 1.02], uncond: [1, 0.5, 2]}',
    ],
)  # fmt: skip
def test_two_lists(text):
    assert parse_ratios(text) == {"cond": ONE, "uncond": TWO}


@given(st.lists(positive, min_size=2, max_size=60), st.sampled_from([",", " ", "\n", " ; ", ", "]))
def test_numbers_come_back_as_they_were_written(values, between):
    assert parse_ratios(between.join(map(repr, values)))["cond"] == tuple(values)


@pytest.mark.parametrize(
    "bad",
    ["0", "-0.98", "nan", "inf", "-inf", "1e999", "1e-999", "x", "0x1p2", "1_000", "١", "1..2",
     "None", "0.98f"],
)  # fmt: skip
def test_a_bad_number_is_named_with_its_place(bad):
    with pytest.raises(AdapterLabError) as caught:
        parse_ratios(f"cond: 1 0.98\nuncond: 1, {bad}")
    assert "Number 2 of the ratios for uncond" in str(caught.value)
    assert f"'{bad}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "for cond is empty"),
        (" [ , ]\n", "for cond is empty"),
        ("cond:", "for cond is empty"),
        ("cond: 1 2 uncond:", "for uncond is empty"),
        ("1.0", "too short: found 1 number,"),
        ("cond: 1 1 uncond: 1 1 cond: 1 1", "'cond:' is in the ratios twice"),
        ("1 2 uncond: 1 2", "in front of 'cond:' or 'uncond:'"),
        ("cond: 1 0.9 uncond: 1 0.9 0.8", "found 2 for cond, 3 for uncond"),
        ("1 " * 10_001, "too long: found 10001 numbers"),
        ("9" * 400, f"'{'9' * 20}...'"),
        ("second: 1 2", "Number 1 of the ratios for cond"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(AdapterLabError) as caught:
        parse_ratios(text)
    assert said in str(caught.value)


@given(st.text())
def test_no_text_fails_in_another_way(text):
    try:
        made = parse_ratios(text)
    except AdapterLabError as error:
        assert str(error)
    else:
        assert all(0 < ratio < float("inf") for ratio in made["cond"] + made["uncond"])


@given(st.text("conduABD:=,; \n[]-+.e019naif", max_size=40))
def test_no_text_of_its_letters_fails_in_another_way(text):
    try:
        made = parse_ratios(text)
    except AdapterLabError as error:
        assert str(error)
    else:
        assert len(made["cond"]) == len(made["uncond"]) > 1
