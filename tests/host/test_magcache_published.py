"""Published lists find the models they are for: built whole by ComfyUI's classes, without data."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.model_detection
import comfy.ops
import flux_kin
import pytest
import tiny
import torch
import wan_kin
from adapter_lab.core.archs import detect as architecture
from adapter_lab.core.cache.published import detect
from adapter_lab.core.keys import ModelIndex
from adapter_lab.nodes.host.model import shapes

KIN = flux_kin.MODELS | wan_kin.MODELS
SMALL_WAN = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN5 = dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
DEEP = dict(depth=19, depth_single_blocks=38)
PRO = dict(
    model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60,
    axes_dims=(32, 48, 48),
)  # fmt: skip
IMAGE = dict(
    model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48), visual_embed_dim=64
)

# (architecture, variant, depth and width) -> ComfyUI's name of the model, the list it gets
WHOLE = [
    ("wan", "t2v", SMALL_WAN, "WAN21_T2V", "wan2.1_t2v_1.3B"),
    ("wan", "t2v", WAN, "WAN21_T2V", "wan2.1_t2v_14B"),
    ("wan", "t2v", WAN5, "WAN22_T2V", "wan2.2_ti2v_5B_t2v"),
    ("wan", "i2v", WAN, "WAN21_I2V", "wan2.1_i2v_480p_14B"),
    ("wan", "t2v", WAN | dict(in_dim=36), "WAN21_T2V", "wan2.2_i2v_A14B"),
    ("wan", "vace", SMALL_WAN | dict(vace_layers=15), "WAN21_Vace", "wan2.1_vace_1.3B"),
    ("wan", "vace", WAN | dict(vace_layers=8), "WAN21_Vace", "wan2.1_vace_14B"),
    ("flux", "dev", DEEP, "Flux", "flux_dev"),
    ("chroma", "base", DEEP, "Chroma", "chroma"),
    ("hunyuan_video", "t2v", dict(depth=20, depth_single_blocks=40), "HunyuanVideo",
     "hunyuan_video_720p"),
    ("hunyuan_video_15", "base", dict(depth=54), "HunyuanVideo15", "hunyuan_video_1.5_t2v_20"),
    ("qwen_image", "base", dict(num_layers=60), "QwenImage", "qwen_image_50"),
    ("kandinsky5", "base", dict(num_visual_blocks=32), "Kandinsky5", "kandinsky5_lite-t2v-5s-sd"),
    ("kandinsky5", "base", PRO, "Kandinsky5", "kandinsky5_pro-t2v-5s-sd"),
    ("kandinsky5", "base", IMAGE, "Kandinsky5Image", "kandinsky5_lite-t2i-hd"),
    ("omnigen2", "base", dict(num_layers=32), "Omnigen2", "omnigen2_t2i_cond"),
]  # fmt: skip
OTHERS = [
    ("wan", "t2v", SMALL_WAN | dict(in_dim=36)),
    ("wan", "i2v", WAN | dict(flf_pos_embed_token_number=514)),
    ("wan", "fun", WAN),
    ("wan", "humo", WAN),
    ("wan", "s2v", WAN),
    ("flux", "schnell", DEEP),
    ("flux", "fill", DEEP),
    ("flux2", "dev", dict(depth=8, depth_single_blocks=48)),
    ("chroma", "radiance", DEEP),
    ("hunyuan_video", "i2v", dict(depth=20, depth_single_blocks=40)),
    ("hunyuan_video", "skyreels", dict(depth=20, depth_single_blocks=40)),
    ("hunyuan_video_15", "meanflow", dict(depth=54)),
    ("qwen_image", "layered", dict(num_layers=60)),
    ("sd3", "sd3.5-medium", {}),
    ("z_image", "base", dict(n_layers=30)),
]


def whole(kind: str, variant: str, size: dict[str, Any]) -> torch.nn.Module:
    dotted, options = KIN[kind][variant]
    module, _, name = dotted.rpartition(".")
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    fixed = dict(operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta")
    return made(**fixed | options | size)


@pytest.mark.parametrize(("kind", "variant", "size", "known_as", "expected"), WHOLE)
def test_published_models(kind, variant, size, known_as, expected):
    model = whole(kind, variant, size)
    config = comfy.model_detection.model_config_from_unet(model.state_dict(), "")
    assert type(config).__name__ == known_as
    found = shapes(model)
    spec = architecture(ModelIndex({f"diffusion_model.{n}": s for n, s in found.items()}))
    assert spec is not None
    chosen = detect(found, architecture=spec.id)
    assert chosen is not None and chosen.name == expected


@pytest.mark.parametrize(("kind", "variant", "size"), OTHERS)
def test_models_that_nobody_measured(kind, variant, size):
    assert detect(shapes(whole(kind, variant, size))) is None


@pytest.mark.parametrize("kind", tiny.BUILDERS)
def test_tiny_models_are_none_of_them(kind):
    build, options = tiny.BUILDERS[kind]
    model = build(**options, operations=comfy.ops.disable_weight_init, device="meta")
    assert detect(shapes(model)) is None


PRO_VIDEO = [
    ((1, 16, 31, 64, 96), (), "kandinsky5_pro-t2v-5s-sd"),
    ((1, 16, 31, 96, 160), (), "kandinsky5_pro-t2v-5s-hd"),
    ((1, 16, 61, 64, 96), (), "kandinsky5_pro-t2v-10s-sd"),
    ((1, 16, 61, 96, 160), (), "kandinsky5_pro-t2v-10s-hd"),
    ((1, 16, 31, 64, 96), ("time_dim_replace",), "kandinsky5_pro-i2v-5s-sd"),
    ((1, 16, 61, 96, 160), ("time_dim_replace",), "kandinsky5_pro-i2v-5s-hd"),
]


@pytest.mark.parametrize(("latent", "uses", "expected"), PRO_VIDEO)
def test_length_and_size_choose(latent, uses, expected):
    chosen = detect(shapes(whole("kandinsky5", "base", PRO)), latent=latent, uses=uses)
    assert chosen is not None and chosen.name == expected


def test_a_first_picture_chooses():
    found = shapes(whole("wan", "t2v", WAN5))
    chosen = detect(found, uses=("noise_mask",))
    assert chosen is not None and chosen.name == "wan2.2_ti2v_5B_i2v"
