"""Which published list a model and a run get; the models' names and shapes are ComfyUI's."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.cache.published import detect, names, published
from adapter_lab.core.errors import AdapterLabError

MODELS = Path(__file__).parents[1] / "data" / "models"
DEPTHS = {  # of the published models; the files have two blocks of each stack
    "wan": {"blocks": 40, "vace_blocks": 8},
    "flux": {"double_blocks": 19, "single_blocks": 38},
    "chroma": {"double_blocks": 19, "single_blocks": 38},
    "hunyuan_video": {"double_blocks": 20, "single_blocks": 40},
    "hunyuan_video_15": {"double_blocks": 54},
    "qwen_image": {"transformer_blocks": 60},
    "kandinsky5": {"visual_transformer_blocks": 32},
    "omnigen2": {"layers": 32},
}
SD, HD = (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)  # 832x480 and 1280x720, 81 frames
NO_MATCH = {"framepack", "framepack_f1", "open_sora_1.2", "omnigen2_edit_ref",
            "omnigen2_edit_uncond", "omnigen2_t2i_uncond", "kandinsky5_lite-t2v-5s-nocfg-sd",
            "kandinsky5_lite-t2v-10s-nocfg-sd"}  # fmt: skip


@cache
def model(architecture, variant, **changes):
    """Weights of a published model by name; ``changes``: stack -> another depth."""
    given = json.loads((MODELS / f"{architecture}.json").read_text())[variant]
    made = {f"{name}.weight": tuple(shape) for name, shape in given.items()}
    made |= {name: tuple(shape) for name, shape in given.items()}
    for stack, depth in (DEPTHS[architecture] | changes).items():
        second = {name: shape for name, shape in made.items() if name.startswith(f"{stack}.1.")}
        for i in range(2, depth):
            made |= {re.sub(r"\.1\.", f".{i}.", n, count=1): s for n, s in second.items()}
    return made


def name(found):
    return found and found.name


def test_every_list_can_be_found_or_is_known_not_to_be():
    with_match = {n for n in names() if n not in NO_MATCH}
    folder = Path(__file__).parents[2] / "core" / "cache" / "ratios"
    for one in names():
        match = json.loads((folder / f"{one}.json").read_text()).get("match")
        assert (match is not None) == (one in with_match)
        assert match is None or match["architecture"] in ARCHITECTURES


@pytest.mark.parametrize(
    ("architecture", "variant", "expected"),
    [
        ("wan", "t2v", "wan2.1_t2v_14B"),
        ("wan", "i2v", "wan2.1_i2v_480p_14B"),
        ("wan", "vace", "wan2.1_vace_14B"),
        ("flux", "dev", "flux_dev"),
        ("chroma", "base", "chroma"),
        ("hunyuan_video", "t2v", "hunyuan_video_720p"),
        ("hunyuan_video_15", "base", "hunyuan_video_1.5_t2v_20"),
        ("qwen_image", "base", "qwen_image_50"),
        ("kandinsky5", "base", "kandinsky5_lite-t2v-5s-sd"),
        ("omnigen2", "base", "omnigen2_t2i_cond"),
    ],
)
def test_by_weights_alone(architecture, variant, expected):
    shapes = model(architecture, variant)
    assert name(detect(shapes)) == expected
    assert name(detect(shapes, architecture=architecture)) == expected
    assert name(detect({f"diffusion_model.{n}": s for n, s in shapes.items()})) == expected
    assert detect(shapes, architecture="sd3") is None


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [(a, v) for a in DEPTHS for v in json.loads((MODELS / f"{a}.json").read_text())
     if v not in ("base", "t2v", "i2v", "vace", "dev")] + [("hunyuan_video", "i2v")],
)  # fmt: skip
def test_variants_that_nobody_measured(architecture, variant):
    assert detect(model(architecture, variant)) is None


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("wan", {"blocks": 2}), ("wan", {"blocks": 39}), ("wan", {"blocks": 41}),
     ("flux", {"single_blocks": 2}), ("qwen_image", {"transformer_blocks": 59})],
)  # fmt: skip
def test_another_depth_is_another_model(architecture, changes):
    variant = {"wan": "t2v", "flux": "dev"}.get(architecture, "base")
    assert detect(model(architecture, variant, **changes)) is None


def test_no_model():
    assert detect({}) is None
    assert detect({"blocks.0.self_attn.q.weight": (128, 128)}) is None


WAN, I2V = ("wan", "t2v"), ("wan", "i2v")
FLUX, QWEN = ("flux", "dev"), ("qwen_image", "base")
HUNYUAN, HUNYUAN15 = ("hunyuan_video", "t2v"), ("hunyuan_video_15", "base")
LITE, OMNIGEN = ("kandinsky5", "base"), ("omnigen2", "base")
EDIT = {"uses": ("reference_latents",)}


@pytest.mark.parametrize(
    ("of", "run", "expected"),
    [
        (I2V, {"latent": SD}, "wan2.1_i2v_480p_14B"),
        (I2V, {"latent": HD}, "wan2.1_i2v_720p_14B"),
        (WAN, {"latent": HD, "steps": 20}, "wan2.1_t2v_14B"),
        (WAN, {"cut": 0.875, "steps": 20}, "wan2.2_t2v_A14B"),
        (WAN, {"cut": 0.3}, "wan2.1_t2v_14B"),
        (HUNYUAN, {"latent": (1, 16, 33, 68, 120)}, "hunyuan_video_544p"),
        (HUNYUAN, {"latent": HD}, "hunyuan_video_720p"),
        (HUNYUAN15, {"steps": 20}, "hunyuan_video_1.5_t2v_20"),
        (HUNYUAN15, {"steps": 25}, "hunyuan_video_1.5_t2v_20"),
        (HUNYUAN15, {"steps": 30}, "hunyuan_video_1.5_t2v_40"),
        (HUNYUAN15, {"steps": 50}, "hunyuan_video_1.5_t2v_40"),
        (QWEN, {"steps": 50}, "qwen_image_50"),
        (QWEN, {"steps": 30}, "qwen_image_40_comfy"),
        (QWEN, EDIT | {"steps": 30}, "qwen_image_edit_50"),
        (FLUX, {"steps": 20}, "flux_dev"),
        (FLUX, EDIT | {"steps": 20}, "flux_kontext_dev_20"),
        (FLUX, EDIT | {"steps": 30}, "flux_kontext_dev_28"),
        (FLUX, {"uses": ("noise_mask", "guidance")}, "flux_dev"),
        (LITE, {"latent": (1, 16, 31, 64, 96)}, "kandinsky5_lite-t2v-5s-sd"),
        (LITE, {"latent": (1, 16, 61, 64, 96)}, "kandinsky5_lite-t2v-10s-sd"),
        (LITE, {"uses": ("time_dim_replace",)}, "kandinsky5_lite-i2v-5s-sd"),
        (OMNIGEN, EDIT, "omnigen2_edit_cond"),
    ],
)
def test_the_run_decides_between_lists_for_the_same_weights(of, run, expected):
    found = detect(model(*of), **run)
    assert found is not None and found.name == expected
    assert expected not in found.also and set(found.also) <= set(names())


def test_what_else_the_weights_could_be_is_told():
    assert detect(model(*WAN)).also == ("wan2.2_t2v_A14B",)
    assert detect(model(*FLUX)).also == ("flux_kontext_dev_20", "flux_kontext_dev_28")
    assert detect(model("wan", "vace")).also == ()


def test_one_list_a_branch():
    found = detect(model(*OMNIGEN))
    assert found.cond == published("omnigen2_t2i_cond").cond
    assert found.uncond == published("omnigen2_t2i_uncond").cond
    assert found.branch("uncond") != found.branch("cond")


def test_what_belongs_to_a_list_comes_with_it():
    found = detect(model(*WAN), cut=0.9)
    assert found.special.boundary == 0.875 and found.special.high
    assert (found.settings[0].threshold, found.settings[0].k) == (0.06, 2)
    assert detect(model(*FLUX)).special.forced == (11, 28)


def test_an_unknown_name():
    with pytest.raises(AdapterLabError, match="No published ratios 'flux'.*flux_dev"):
        published("flux")
