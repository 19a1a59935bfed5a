"""HunyuanImage 2.1: base, distilled and refiner; the layers of HunyuanVideo."""

from __future__ import annotations

from dataclasses import replace

from .base import ArchSpec, aliases, has_all, own_names
from .hunyuan_video import ENDS, FAMILIES, KEEP, ORIGINAL, REFINER, REFINER_NORMS, SPLIT
from .streams import BLOCKS, DOUBLE, FUSED, GROUPS, NORMS, SINGLE, embedders

ORDER = 1  # where names alone decide between it and HunyuanVideo, HunyuanVideo is meant

_LAYERS = (
    *ENDS,
    *REFINER,
    *embedders("time_guidance_embed.timestep_embedder.", "time_in."),
    *embedders("time_guidance_embed.timestep_embedder_r.", "time_r_in."),
    *embedders("time_guidance_embed.guidance_embedder.", "guidance_in."),
    *aliases("", "", {f"context_embedder_2.linear_{i}": f"byt5_in.fc{i}" for i in (1, 2, 3)}),
    *DOUBLE,
    *SINGLE,
)
_NORMS = (
    *aliases("", "", {"context_embedder_2.norm": "byt5_in.layernorm"}),
    *REFINER_NORMS,
    *NORMS,
)
# Only read: sd-scripts' files of it have q, k and v in one.
_SPLIT = tuple(replace(alias, family="other") for alias in SPLIT) + aliases(
    "single_blocks.{}.", "single_blocks.{}.", {
    "linear1_q": ("linear1", 0, 1),
    "linear1_k": ("linear1", 1, 1),
    "linear1_v": ("linear1", 2, 1),
    "linear1_mlp": ("linear1", 3, None),
    "linear2.fc": "linear2",
}, family="other")  # fmt: skip
# HunyuanVideo has vector_in, HunyuanVideo 1.5 no single blocks.
_has_layers = has_all("img_in.proj", "txt_in.input_embedder", "single_blocks.0.linear1")


HUNYUAN_IMAGE = ArchSpec(
    id="hunyuan_image",
    title="HunyuanImage 2.1",
    detect=lambda shapes: _has_layers(shapes) and "vector_in.in_layer" not in shapes,
    blocks=BLOCKS,
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS + ORIGINAL + _SPLIT + FUSED,
    excludes=(r".*(img_mod|txt_mod|modulation).*", r".*(norm).*"),
    hidden="img_in.proj",
    base_versions=("hunyuan-image-2.1",),
    modelspec=("hunyuan-image-2.1", "hunyuan-image"),
    families=FAMILIES,
    keep=KEEP,
    groups=GROUPS,
)
