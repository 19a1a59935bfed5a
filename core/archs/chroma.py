"""Chroma and Chroma Radiance: FLUX.1's blocks, their modulation from one small network."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names
from .streams import ATTENTION, BLOCKS, FUSED, GROUPS, LINEAR, MLP, NORMS

ORDER = 1  # where names alone decide between it and FLUX.1, FLUX.1 is meant

_LAYERS = (
    *aliases("", "", {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
    }),
    *aliases("distilled_guidance_layer.", "distilled_guidance_layer.", {
        "in_proj": "in_proj",
        "out_proj": "out_proj",
        "layers.{}.linear_1": "layers.{}.in_layer",
        "layers.{}.linear_2": "layers.{}.out_layer",
    }),
    *ATTENTION,
    *MLP,
    *LINEAR,
)  # fmt: skip
_NORMS = (
    *aliases("", "", {"distilled_guidance_layer.norms.{}": "distilled_guidance_layer.norms.{}"}),
    *NORMS,
)
_RADIANCE = (
    "img_in_patch", "nerf_image_embedder.embedder.0", "nerf_blocks.{}.param_generator",
    "nerf_final_layer.linear", "nerf_final_layer_conv.conv",
)  # fmt: skip

CHROMA = ArchSpec(
    id="chroma",
    title="Chroma",
    detect=has_all("txt_in", "distilled_guidance_layer.in_proj", "double_blocks.0.img_attn.qkv"),
    blocks=BLOCKS,
    layers=(*own_names(_LAYERS), *_RADIANCE),
    aliases=_LAYERS + _NORMS + FUSED,
    excludes=(r".*(norm).*",),
    hidden="txt_in",
    base_versions=("chroma", "chroma_radiance"),
    modelspec=("chroma", "Chroma1"),
    keep=(
        r"(img_in|img_in_patch|txt_in|final_layer\..+)",
        r"(distilled_guidance_layer|nerf_.+)\..+",
        r".*norm.*",
    ),
    groups={name: found for name, found in GROUPS.items() if name != "modulation"}
    | {"modulation": ("distilled_guidance_layer.*",)},
)
