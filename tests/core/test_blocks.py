"""Strengths by part of a model: what a line hits, which one wins, what is said of bad ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.keys.blocks import GROUPS, groups, parse
from hypothesis import given
from hypothesis import strategies as st

PATHS = (
    "img_in", "double_blocks.3", "double_blocks.3.img_attn.qkv", "double_blocks.30.img_attn.qkv",
    "double_blocks.12.txt_mlp.0", "single_blocks.3.linear1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("double_blocks.3 = 0.5", (1, 2)),
        ("double_blocks = 0.5", (1, 2, 3, 4)),
        ("double_block = 0.5", ()),
        ("*.img_attn.* = 0.5", (2, 3)),
        ("*.img_attn = 0.5", (2, 3)),
        ("*_blocks.3 = 0.5", (1, 2, 5)),
        ("double_blocks.{3-12} = 0.5", (1, 2, 4)),
        ("double_blocks.? = 0.5", (1, 2)),
        ("*=.5", (0, 1, 2, 3, 4, 5)),
        ("@attention = 0.5", (2, 3)),
        ("# double_blocks = 0.5\n\n  img_in=0.5  # only this", (0,)),
        ("img.in = 0.5", ()),
        ("diffusion_model.double_blocks.3 = 0.5", (1, 2)),
        ("diffusion_model.double_blocks.3.img_attn.qkv.weight = 0.5", (2,)),
        ("double_blocks.*.weight = 0.5", (1, 2, 3, 4)),
    ],
)
def test_what_a_line_hits(text, hit):
    weights = parse(text)
    assert [weights.weight_of(path) for path in PATHS] == [
        0.5 if n in hit else 1.0 for n in range(len(PATHS))
    ]


def test_the_last_line_that_hits_wins():
    weights = parse("* = 0\ndouble_blocks = 0.5\ndouble_blocks.3 = -2\nimg_in = 1.5")
    assert [weights.weight_of(path) for path in PATHS] == [1.5, -2, -2, 0.5, 0.5, 0]


def test_text_encoders_are_below_their_part():
    weights = parse("clip_l = 0.5\n*.layers.3 = 0.25\n*_proj = 0.125")
    layer = "text_model.encoder.layers.{}.mlp.fc1"
    assert weights.weight_of(layer.format(0), "clip_l") == 0.5
    assert weights.weight_of(layer.format(3), "clip_g") == 0.25
    assert weights.weight_of(layer.format(0), "clip_g") == 1
    assert weights.weight_of("clip_l") == 0.5


@pytest.mark.parametrize("part", ["clip_l", "t5xxl", "mistral3_24b", "gpt_oss", "jina_clip_2"])
def test_the_group_of_text_encoders(part):
    weights = parse("@text_encoder = 0.5")
    assert weights.weight_of("model.layers.0.mlp", part) == 0.5
    assert weights.weight_of("clip_mapper") == weights.weight_of("text_encoders_in") == 1


@pytest.mark.timeout(60)
def test_many_stars_take_no_time():
    weights = parse("*a" * 12 + "b = 0.5\n" + "*a" * 12 + " = 0.25")
    assert weights.weight_of("a" * 60) == 0.25
    assert weights.weight_of("a" * 60 + "b") == 0.5
    assert weights.weight_of("a" * 11 + "b") == 1


def test_lines_that_hit_nothing_are_told():
    weights = parse("double_blocks.3 = 0.5\nblocks.3 = 0.5\nclip_l = 2")
    places = [(path, "model") for path in PATHS]
    assert weights.unused(places) == ["blocks.3 = 0.5", "clip_l = 2"]
    assert weights.unused([*places, ("text_projection", "clip_l")]) == ["blocks.3 = 0.5"]
    assert not parse("") and not parse("# nothing\n")
    assert parse("").weight_of("img_in") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\n\nnonsense", "Line 3.*'nonsense'"),
        ("a = much", "Line 1.*'a = much'"),
        ("= 1", "Line 1"),
        ("a = nan", "Line 1"),
        ("a =", "Line 1"),
        ("a.{3-1} = 1", r"Line 1.*\{3-1\}"),
        ("a.{0-99999999999} = 1", "Line 1.*10000"),
        ("@nothing = 1", "Line 1.*@nothing.*@attention"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(text, said):
    with pytest.raises(AdapterLabError, match=said):
        parse(text)


def test_groups_of_an_architecture():
    spec = replace(ARCHITECTURES["flux"], groups={"ends": ("img_in", "final_layer")})
    assert set(groups(spec)) == {*GROUPS, "ends"}
    weights = parse("@ends = 0", spec)
    assert [weights.weight_of(p) for p in ("img_in", "final_layer.linear", "txt_in")] == [0, 0, 1]


@given(st.text(alphabet="ab.*?{}0-9[](|\\", min_size=1, max_size=12), st.floats(-9, 9))
def test_any_pattern_is_a_pattern(pattern, weight):
    weights = parse(f"{pattern.strip() or 'a'} = {weight!r}")
    assert weights.weight_of("a.b.0") in (1.0, weight)
