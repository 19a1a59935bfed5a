"""Regular expressions decide as ``re`` does, and in bounded time."""

from __future__ import annotations

import re

import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.patterns import Match, Pattern, pattern
from hypothesis import given, settings
from hypothesis import strategies as st

ATOMS = (
    "a", "b", ".", "0", r"\d", r"\W", r"\s", "[ab]", "[^a]", "[a-b0]", r"[^\d.]", "^", "$", r"\b",
    "(?=a)", "(?!b)", "(?<=a)", "(?<!b0)", "(?i:A)", "(?P<n>a)", r"\.",
)  # fmt: skip
AFTER = ("", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,}")


def wider(inner):
    return st.one_of(
        st.tuples(inner, st.sampled_from(AFTER)).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), wider, max_leaves=6)
NAMES = st.text("ab0._", min_size=1, max_size=8)


def walked(text, name):
    """Decided without ``re``, however few ways there are."""
    made = Pattern(text)
    return bool(Match(name, made._folds, text).run(made._nodes, 1) >> len(name) & 1)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(PATTERNS, NAMES, st.sampled_from(["", "(?i)"]))
def test_decides_as_re_does(text, name, flags):
    text = flags + text.replace("(?P<n>a)", "(a)")
    assert walked(text, name) == bool(re.fullmatch(text, name))
    assert Pattern(text).fullmatch(name) == bool(re.fullmatch(text, name))


def test_case_counts_unless_told():
    assert walked("(?i)double_BLOCKS", "Double_blocks")
    assert not walked("double_BLOCKS", "Double_blocks")
    assert not walked("(?i)[^a]", "A")
    assert walked("(?i)a.B", "A\u00dfb") and not walked("(?i)ss", "\u00df")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$b", "(.*)*x", "(a|a)*b", "(?:.|..)*(?:.|..)*x", "((.{1,50}){1,50}){1,50}x",
        ".*.*.*.*.*.*.*.*.*.*.*.*x", "(a|a)" * 60 + "x", "(?=(.*)*x).*", "((a?){1000}){1000}x",
        "(((((((((.*)*)*)*)*)*)*)*)*)*x", "(?i)(A+)+x",
    ],
)  # fmt: skip
def test_no_pattern_takes_forever(text):
    assert not pattern(text).fullmatch("a" * 120)


@pytest.mark.parametrize(
    "text",
    ["(", "*", "[b-a]", "a{99999999999}", "a" * 1001, "(a)\\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)"],
)
def test_what_is_none_is_refused(text):
    with pytest.raises(AdapterLabError, match="not a regular expression"):
        Pattern(text)
