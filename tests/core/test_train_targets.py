"""Which modules a choice of targets trains."""

from __future__ import annotations

import pytest
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.targets import Targets

NAMES = [
    "img_in",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.img_mlp.0",
    "single_blocks.12.linear1",
    "single_blocks.12.modulation.lin",
    "final_layer.linear",
]
FLUX = ARCHITECTURES["flux"]


def test_presets():
    attention_and_mlp = [NAMES[1], NAMES[3], NAMES[4]]
    assert Targets("default").select(NAMES, FLUX) == attention_and_mlp
    assert Targets("all blocks").select(NAMES, FLUX) == NAMES[1:6]
    assert Targets("everything").select(NAMES, FLUX) == NAMES


def test_include_readmits_and_does_not_filter():
    """musubi-tuner: skipped if excluded and not included."""
    assert Targets("everything", include=(".*qkv",)).select(NAMES, FLUX) == NAMES
    only = Targets("everything", exclude=(".*",), include=(".*qkv",))
    assert only.select(NAMES, FLUX) == [NAMES[1]]
    modulation = Targets("default", include=(r".*img_mod\.lin",))
    assert NAMES[2] in modulation.select(NAMES, FLUX)


def test_patterns_match_whole_names():
    assert Targets("everything", exclude=("img_attn",)).select(NAMES, FLUX) == NAMES


def test_patterns_without_effect_are_named():
    assert Targets("everything", ("img_attn",), (".*qkv",)).idle(NAMES) == ["img_attn"]


def test_unknown_architecture_trains_everything():
    assert Targets("default").select(NAMES, None) == NAMES


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Targets("everything", exclude=("(",)), "regular expression"),
        (lambda: Targets("nothing"), "Unknown preset"),
        (lambda: Targets("everything", exclude=(".*",)).select(NAMES, FLUX), "No module is left"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(AdapterLabError, match=says):
        make()
