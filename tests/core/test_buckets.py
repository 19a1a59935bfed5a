"""Aspect buckets against musubi-tuner's, and plans that neither stretch nor enlarge."""

from __future__ import annotations

import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.buckets import Buckets, frames, starts
from hypothesis import given, settings
from hypothesis import strategies as st

# What musubi-tuner's BucketSelector (commit 30c658c) lists for these resolutions and steps.
MUSUBI = {
    (1024, 64): [
        (512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152),
        (960, 1088), (1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1472, 704),
        (1600, 640), (1792, 576), (2048, 512),
    ],
    (512, 64): [
        (256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384),
        (768, 320), (1024, 256),
    ],
    (960, 32): [
        (480, 1920), (512, 1792), (544, 1664), (576, 1600), (608, 1504), (640, 1440), (672, 1344),
        (704, 1280), (736, 1248), (768, 1184), (800, 1152), (832, 1088), (864, 1056), (896, 1024),
        (928, 992), (960, 960), (992, 928), (1024, 896), (1056, 864), (1088, 832), (1152, 800),
        (1184, 768), (1248, 736), (1280, 704), (1344, 672), (1440, 640), (1504, 608), (1600, 576),
        (1664, 544), (1792, 512), (1920, 480),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("resolution", "step"), MUSUBI)
def test_sizes_are_musubis(resolution, step):
    assert Buckets(resolution, step).sizes == MUSUBI[resolution, step]


# Of a picture: musubi's bucket with no_upscale, by the rule in its get_bucket_resolution.
@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 700), (960, 640)),  # no larger than the area: as it is, cut to the step
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((3840, 2160), (1344, 768)),
        ((5000, 1000), (2048, 512)),
    ],
)
def test_buckets_of_pictures(size, bucket):
    assert Buckets(1024).plan(*size).size == bucket


def test_turning_a_picture_turns_its_bucket():
    """The nearest by difference of aspects is another for a portrait than for its landscape."""
    buckets = Buckets(1024)
    for width in range(1100, 5000, 37):
        assert buckets.plan(width, 2000).size == buckets.plan(2000, width).size[::-1]


@settings(max_examples=200, deadline=None)
@given(st.integers(64, 9000), st.integers(64, 9000), st.sampled_from((256, 512, 1024)),
       st.booleans(), st.booleans())  # fmt: skip
def test_plans(width, height, resolution, upscale, square):
    buckets = Buckets(resolution, 64, upscale, square=square)
    plan = buckets.plan(width, height)
    left, top, right, bottom = plan.box
    assert all(side % 64 == 0 and side > 0 for side in plan.size)
    assert plan.size[0] * plan.size[1] <= resolution**2
    # The same scale on both axes, the whole of one side, and the cut in the middle.
    assert plan.scale == pytest.approx(plan.size[1] / (bottom - top))
    assert (
        right - left == pytest.approx(width)
        or bottom - top == pytest.approx(height)
        or (plan.scale == pytest.approx(1))
    )
    assert (left, top) == pytest.approx((width - right, height - bottom), abs=1e-6)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert upscale or plan.scale <= 1 + 1e-9
    if upscale:
        assert plan.size in buckets.sizes


@pytest.mark.parametrize("size", [(1, 1), (63, 4000), (0, 100)])
def test_pictures_too_small(size):
    with pytest.raises(AdapterLabError, match="too small.*64"):
        Buckets(512).plan(*size)


def test_small_pictures_may_be_enlarged():
    plan = Buckets(512, upscale=True).plan(32, 32)
    assert (plan.size, plan.scale) == ((512, 512), 16)


@pytest.mark.parametrize("options", [(64, 128), (512, 0), (512, 64, False, 0.5)])
def test_impossible_buckets(options):
    with pytest.raises(AdapterLabError, match="impossible"):
        Buckets(*options)


@pytest.mark.parametrize(
    ("available", "wanted", "ratio", "kept"),
    [(100, 17, 4, 17), (16, 17, 4, 13), (4, 17, 4, 1), (1, 17, 4, 1), (30, 30, 8, 25),
     (10, 5, 1, 5)],
)  # fmt: skip
def test_frames_that_a_vae_keeps(available, wanted, ratio, kept):
    assert frames(available, wanted, ratio) == kept


def test_clips_are_spread_and_do_not_overlap():
    assert starts(100, 17, 1) == [0]
    assert starts(100, 17, 3) == [0, 42, 83]
    assert starts(40, 17, 5) == [0, 23]
    assert starts(5, 1, 9) == [0, 1, 2, 3, 4]
