"""Stable Cascade, stages B and C: names as diffusers', but for the attention's projections."""

from __future__ import annotations

from typing import Any

from .base import Alias, ArchSpec, Condition, aliases, has_all, own_names

_SIDES = ("down_blocks", "up_blocks")
# A block's place tells its kind only together with the level; ``{}.{}`` is any of them.
_ATTENTION = tuple(
    alias for side in _SIDES for alias in (
        *aliases(f"{side}.{{}}.{{}}.attention.", f"{side}.{{}}.{{}}.attention.", {
            "to_q": "attn.to_q",
            "to_k": "attn.to_k",
            "to_v": "attn.to_v",
            "to_out.0": "attn.out_proj",
        }),
        # OneTrainer: parts of the fused weight that torch's own attention has.
        *aliases(f"{side}.{{}}.{{}}.attention.", f"{side}.{{}}.{{}}.attention.", {
            f"attn.in_proj.{i}": f"attn.to_{x}" for i, x in enumerate("qkv")
        }, family="other"),
    )
)  # fmt: skip
_SAME = (
    *(
        f"{side}.{{}}.{{}}.{leaf}" for side in _SIDES for leaf in (
            "depthwise", "channelwise.0", "channelwise.4", "kv_mapper.1",
            "mapper", "mapper_sca", "mapper_crp",
        )
    ),
    *(f"{side}_repeat_mappers.{{}}.{{}}" for side in ("down", "up")),
    "embedding.1", "clf.1",
)  # fmt: skip
_STAGE_C = (
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper",
    "down_downscalers.{}.1.blocks.{}", "up_upscalers.{}.1.blocks.{}",
)  # fmt: skip
_STAGE_B = (
    "effnet_mapper.0", "effnet_mapper.2", "pixels_mapper.0", "pixels_mapper.2",
    "down_downscalers.{}.1",
)  # fmt: skip


def _stage(
    id: str, title: str, detect: Condition, layers: tuple[str, ...],
    extra: tuple[Alias, ...] = (), **fields: Any,
) -> ArchSpec:  # fmt: skip
    same = tuple(Alias(name, name) for name in (*_SAME, *layers))
    return ArchSpec(
        id=id,
        title=title,
        detect=detect,
        blocks=(r"(down|up)_blocks\.\d+\.\d+",),
        layers=own_names((*_ATTENTION, *same, *extra)),
        aliases=(*_ATTENTION, *same, *extra),
        excludes=(r"(?!.*(attention|kv_mapper)).*",),
        prefixes={"diffusers": {"model": "unet."}, "kohya": {"model": "lora_prior_unet_"}},
        keep=(
            r"(embedding|clf|clip_.+|effnet_mapper|pixels_mapper)(\..+)?",
            r".*(mapper|mapper_sca|mapper_crp|gamma|beta)",
        ),
        groups={
            "down": ("down_blocks.*",),
            "up": ("up_blocks.*",),
            "attention": ("*.attention.*", "*.kv_mapper.*"),
            "mlp": ("*.channelwise.*",),
            "modulation": ("*.mapper", "*.mapper_*"),
        },
        **fields,
    )


STAGE_C = _stage(
    "cascade_c",
    "Stable Cascade C",
    has_all("clf.1", "clip_txt_mapper", "down_blocks.0.0.channelwise.0"),
    _STAGE_C,
    modelspec=("stable-cascade-v1-prior",),
)
STAGE_B = _stage(
    "cascade_b",
    "Stable Cascade B",
    has_all("clf.1", "effnet_mapper.0", "down_blocks.0.0.channelwise.0"),
    _STAGE_B,
    (Alias("clip_txt_pooled_mapper", "clip_mapper"),),
)
