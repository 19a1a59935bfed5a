"""The UNets of SD1.5, SD2 and SDXL. Which of their blocks is which of diffusers' varies.

Own names count blocks through ("input_blocks.4.1"); diffusers counts levels and, within a level,
residual blocks, attentions and resamplers apart ("down_blocks.1.attentions.0").
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count
from typing import Any, Literal

from .base import Alias, ArchSpec, Condition, Shapes, aliases, own_names

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_ATTENTION = {name: name for name in ("proj_in", "proj_out")}
_TRANSFORMER = {
    **{f"attn{i}.to_{x}": f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")},
    "attn1.to_out": "attn1.to_out.0",  # diffusers before 0.20 had the adapter beside the layer
    "attn2.to_out": "attn2.to_out.0",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}
_TRANSFORMER_NORMS = {f"norm{i}": f"norm{i}" for i in (1, 2, 3)}
_ENDS = aliases("", "", {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
})  # fmt: skip
_END_NORMS = aliases("", "", {"conv_norm_out": "out.0"})


def _blocks(modules: Container[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, their prefix, own prefix) of every block that ``modules`` holds."""
    for side, own_side in (("down", "input_blocks"), ("up", "output_blocks")):
        level = place = 0
        for n in count(1 if side == "down" else 0):
            own, theirs = f"{own_side}.{n}.", f"{side}_blocks.{level}."
            if own + "0.in_layers.2" in modules:
                yield "resnet", f"{theirs}resnets.{place}.", own + "0."
                if own + "1.proj_in" in modules:
                    yield "attention", f"{theirs}attentions.{place}.", own + "1."
                place += 1
            ends = [leaf for leaf in ("0.op", "1.conv", "2.conv") if own + leaf in modules]
            for leaf in ends:
                yield "sampler", f"{theirs}{side}samplers.0.conv", own + leaf
                level, place = level + 1, 0
            if not ends and own + "0.in_layers.2" not in modules:
                break
    yield "resnet", "mid_block.resnets.0.", "middle_block.0."
    yield "attention", "mid_block.attentions.0.", "middle_block.1."
    yield "resnet", "mid_block.resnets.1.", "middle_block.2."


def _table(modules: Container[str], depth: str = "{}") -> tuple[list[Alias], list[Alias]]:
    """Aliases of the layers and of the norms. ``depth``: the transformer blocks' index."""
    layers, norms = list(_ENDS), list(_END_NORMS)
    for kind, theirs, own in _blocks(modules):
        inner, own_inner = (f"{p}transformer_blocks.{depth}." for p in (theirs, own))
        if kind == "resnet":
            layers += aliases(theirs, own, _RESNET)
            norms += aliases(theirs, own, _RESNET_NORMS)
        elif kind == "attention":
            layers += aliases(theirs, own, _ATTENTION)
            layers += aliases(inner, own_inner, _TRANSFORMER)
            norms += aliases(inner, own_inner, _TRANSFORMER_NORMS)
            norms.append(Alias(theirs + "norm", own + "norm"))
        else:
            layers.append(Alias(theirs, own))
    return layers, norms


def _layout(shapes: Shapes) -> tuple[Alias, ...]:
    layers, norms = _table(shapes)
    return tuple(layers + norms)


def _published(attention: tuple[bool, ...]) -> set[str]:
    """The modules ``_blocks`` looks at, of a UNet with two residual blocks a level."""
    modules: set[str] = set()
    last, n = len(attention) - 1, 1
    for level, attends in enumerate(attention):
        for _ in range(2):
            modules |= {f"input_blocks.{n}.0.in_layers.2"}
            modules |= {f"input_blocks.{n}.1.proj_in"} if attends else set()
            n += 1
        modules |= {f"input_blocks.{n}.0.op"} if level < last else set()
        n += 1
    for n in range(3 * (last + 1)):
        level, own = last - n // 3, f"output_blocks.{n}."
        modules |= {own + "0.in_layers.2"}
        modules |= {own + "1.proj_in"} if attention[level] else set()
        modules |= {f"{own}{1 + attention[level]}.conv"} if n % 3 == 2 and level else set()
    return modules


_GROUPS = {
    "down": ("input_blocks.*",),
    "middle": ("middle_block.*",),
    "up": ("output_blocks.*",),
    "attention": ("*.attn1.*", "*.attn2.*"),
    "self attention": ("*.attn1.*",),
    "cross attention": ("*.attn2.*",),
    "mlp": ("*.ff.*",),
    "convolution": ("*.in_layers.2", "*.out_layers.3", "*.skip_connection"),
    "modulation": ("*.emb_layers.*", "time_embed.*", "label_emb.*"),
}


def _unet(
    id: str, title: str, detect: Condition, attention: tuple[bool, ...], depth: str = "{}",
    **fields: Any,
) -> ArchSpec:  # fmt: skip
    layers, norms = _table(_published(attention), depth)
    return ArchSpec(
        id=id,
        title=title,
        detect=detect,
        blocks=(r"(input_blocks|output_blocks)\.\d+\.\d+", r"middle_block\.\d+"),
        layers=own_names(layers),
        aliases=tuple(layers + norms),
        excludes=(r"(?!.*(transformer_blocks|proj_in|proj_out)).*", r".*norm.*"),
        layout=_layout,
        keep=(
            r"(input_blocks\.0\.0|time_embed\..+|label_emb\..+|out\..+)",
            r".*(norm\d?|emb_layers\.\d+|(in|out)_layers\.0)",
        ),
        groups=_GROUPS,
        **fields,
    )


def _is_unet(shapes: Shapes) -> bool:
    return "input_blocks.0.0" in shapes and "middle_block.1.proj_in" in shapes


def _projects(shapes: Shapes) -> Literal["linear", "convolution"]:
    return "linear" if len(shapes["middle_block.1.proj_in"]) == 2 else "convolution"


def _context(shapes: Shapes) -> int:
    """The width of the text encoder's states."""
    return shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k", (0, 0))[1]


def _is_sd2(shapes: Shapes) -> bool:
    # Also the width of the image encoder of SVD, which attends along time as well.
    return (
        _is_unet(shapes)
        and _projects(shapes) == "linear"
        and _context(shapes) == 1024
        and "middle_block.1.time_stack.0.attn1.to_q" not in shapes
    )


SD15 = _unet(
    "sd15",
    "SD1.5",
    # SD2 projects with linear layers, SD1 with 1x1 convolutions.
    lambda shapes: _is_unet(shapes) and _projects(shapes) == "convolution",
    attention=(True, True, True, False),
    depth="0",
    base_versions=("sd_v1", "sd_v1_v", "sd_1.5"),
    modelspec=("stable-diffusion-v1",),
    prefixes={"diffusers": {"model": "unet."}, "kohya": {"clip_l": "lora_te_"}},
    families={"kohya": "diffusers"},
)
SD2 = _unet(
    "sd2",
    "SD2",
    _is_sd2,
    attention=(True, True, True, False),
    depth="0",
    base_versions=("sd_v2", "sd_v2_v", "sd_2.1"),
    modelspec=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v", "stable-diffusion-v2"),
    prefixes={"diffusers": {"model": "unet."}, "kohya": {"clip_h": "lora_te_"}},
    families={"kohya": "diffusers"},
)
SDXL = _unet(
    "sdxl",
    "SDXL",
    lambda shapes: _is_unet(shapes) and shapes.get("label_emb.0.0", (0, 0))[1] == 2816,
    attention=(False, True, True),
    base_versions=("sdxl_base_v1-0", "sdxl_1.0", "ssd", "vega"),
    modelspec=("stable-diffusion-xl-v1-base",),
    prefixes={"diffusers": {"model": "unet."}},
)
