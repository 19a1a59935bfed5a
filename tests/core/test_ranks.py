"""How many singular values each rule keeps."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.lowrank import Spectrum
from adapter_lab.core.merge.menus import RULES
from adapter_lab.core.merge.ranks import RankRule

VALUES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]
SHAPE = (6, 9)


def spectrum(values=VALUES, known=None):
    s = torch.tensor(values)
    total, nuclear = float(s.norm()), float(s.sum())
    q = known or len(values)
    rest = float(s[q:].norm())
    return Spectrum(torch.eye(6)[:, :q], s[:q], torch.eye(q, 9), total, nuclear, rest)


@pytest.mark.parametrize(
    ("rule", "parameter", "rank"),
    [
        ("fixed", 0.0, 6),
        ("sv_ratio", 1.0, 2),  # none is above S_1; clamped to 1, plus 1
        ("sv_ratio", 4.0, 3),  # above 2: two values, plus 1
        ("sv_ratio", 5.0, 4),
        ("sv_ratio", 1e6, 6),  # all six, clamped to 5, plus 1
        ("sv_cumulative", 0.5, 2),  # 8 of 15.75: the first is enough, plus 1
        ("sv_cumulative", 0.6, 3),
        ("sv_cumulative", 0.9, 5),  # 15 of 15.75, four values, plus 1
        ("sv_fro", 0.8, 2),  # 64 / 85.3 > 0.64
        ("sv_fro", 0.9, 3),  # 80 / 85.3 > 0.81, two values, plus 1
        ("sv_fro", 1.0, 6),
        ("error", 0.5, 1),  # the first alone leaves sqrt(21.3 / 85.3) = 0.4998
        ("error", 0.24, 3),
        ("error", 0.01, 6),
    ],
)
def test_ranks_by_hand(rule, parameter, rank):
    assert RankRule(rule, parameter).choose(spectrum(), SHAPE) == rank


def test_error_rule_takes_the_fewest_that_are_within_it():
    found = spectrum()
    for rank in range(1, 6):
        exact = math.sqrt(sum(v * v for v in VALUES[rank:]) / sum(v * v for v in VALUES))
        assert found.error(rank) == pytest.approx(exact, rel=1e-6)
        assert RankRule("error", exact * 1.001).choose(found, SHAPE) == rank
        assert RankRule("error", exact * 0.999).choose(found, SHAPE) == rank + 1


@pytest.mark.parametrize("rule", RULES)
def test_caps(rule):
    parameter = 1e9 if rule == "sv_ratio" else 0.999 if rule != "error" else 1e-6
    capped = RankRule(rule, parameter, rank=4, conv_rank=3)
    assert capped.choose(spectrum(), SHAPE) == 4
    assert capped.choose(spectrum(), (6, 1, 3, 3)) == 3
    assert capped.choose(spectrum(), (6, 9, 1, 1)) == 4
    kohya = RankRule(rule, parameter, rank=4, conv_rank=3, pointwise=True)
    assert kohya.choose(spectrum(), (6, 9, 1, 1)) == 3
    assert RankRule(rule, parameter, rank=4).choose(spectrum(), (6, 1, 3, 3)) == 4
    assert RankRule(rule, parameter, rank=100).cap((6, 1, 3, 3)) == 6


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_of_zeros_or_of_rank_one_gets_rank_one(rule):
    parameter = 4.0 if rule == "sv_ratio" else 0.5
    assert RankRule(rule, parameter, rank=4).choose(spectrum([0.0] * 6), SHAPE) == 1
    noise = [5.0, 1e-7, 1e-7, 1e-8, 1e-9, 0.0]
    assert RankRule(rule, parameter, rank=4).choose(spectrum(noise), SHAPE) == 1


@pytest.mark.parametrize(
    ("rule", "parameter", "known"),
    [("sv_ratio", 5.0, 5), ("sv_fro", 0.9, 4), ("error", 0.24, 4), ("sv_cumulative", 0.6, 4)],
)
def test_known_singular_values_decide_as_all_of_them_do(rule, parameter, known):
    """A rule is only called settled where more values would not change its rank."""
    asked = RankRule(rule, parameter)
    whole = asked.choose(spectrum(), SHAPE)
    settled = [q for q in range(1, 7) if asked.settled(spectrum(known=q), SHAPE)]
    assert settled and min(settled) <= known
    assert {asked.choose(spectrum(known=q), SHAPE) for q in settled} == {whole}


def test_what_cannot_be_told_is_not_settled():
    cut = Spectrum(torch.eye(6)[:, :4], torch.tensor(VALUES[:4]), torch.eye(4, 9), 9.24, None, 0.56)
    assert not RankRule("sv_cumulative", 0.1).settled(cut, SHAPE)
    assert not RankRule("fixed").settled(cut, SHAPE)
    assert RankRule("fixed", rank=4).settled(cut, SHAPE)


@pytest.mark.parametrize(
    ("rule", "parameter"),
    [
        ("sv_ratio", 0.5), ("sv_ratio", math.inf), ("sv_fro", 0.0), ("sv_fro", 1.1),
        ("sv_cumulative", -0.1), ("error", 1.0), ("error", 0.0), ("sv_fro", math.nan),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(rule, parameter):
    with pytest.raises(AdapterLabError, match=f"does not suit the rule {rule}: found"):
        RankRule(rule, parameter)


def test_unknown_rules_and_negative_ranks_are_refused():
    with pytest.raises(AdapterLabError, match="no such rank rule: found sv_frob, expected fixed"):
        RankRule("sv_frob", 0.9)
    with pytest.raises(AdapterLabError, match="negative: found -1"):
        RankRule("fixed", conv_rank=-1)
