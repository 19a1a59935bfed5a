"""FLUX.1 (dev, schnell, Kontext, Fill, Krea), and LongCat-Image and Ovis-Image of its class.

Fused q/k/v, 19 double and 38 single blocks or fewer.
"""

from __future__ import annotations

from .base import Alias, ArchSpec, aliases, has_all, own_names, swapped
from .streams import BLOCKS, DOUBLE, FUSED, GROUPS, NORMS, SINGLE, STREAMS, double, embedders

ORDER = -1  # of several entries that name the layers of a file alike, the first is meant

_ENDS = (
    *aliases("", "", {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
    }),
    *aliases("", "", {"norm_out.linear": "final_layer.adaLN_modulation.1"}, order=swapped),
)  # fmt: skip
_TIME = (
    *embedders("time_text_embed.timestep_embedder.", "time_in."),
    *embedders("time_text_embed.text_embedder.", "vector_in."),
    *embedders("time_text_embed.guidance_embedder.", "guidance_in."),
)
_LAYERS = (*_ENDS, *_TIME, *DOUBLE, *SINGLE)
_OTHERS = (
    # XLabs, USO: the layers of an attention processor, the image's first.
    *aliases("double_blocks.{}.", "double_blocks.{}.", {
        f"{layer}_lora{i}": f"{stream}_attn.{layer}"
        for i, stream in enumerate(STREAMS, 1)
        for layer in ("qkv", "proj")
    }, family="other"),
    *aliases("single_blocks.{}.", "single_blocks.{}.", {
        "qkv_lora": ("linear1", 0, 3),
        "proj_lora": "linear2",
    }, family="other"),
    *aliases("single_blocks.{}.", "single_blocks.{}.", {"linear1_qkv": ("linear1", 0, 3)},
             family="own"),
)  # fmt: skip

_has_modulation = has_all("img_in", "double_blocks.0.img_mod.lin")
_EXCLUDES = (r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*", r".*(norm).*")
_KEEP = (
    r"(img_in|txt_in|txt_norm|(time|vector|guidance)_in\..+|final_layer\..+)",
    r".*(norm|mod\.lin|modulation\.lin).*",
)

FLUX = ArchSpec(
    id="flux",
    title="FLUX.1",
    # FLUX.2 and Chroma have no vector_in, HunyuanVideo has img_in.proj instead of img_in.
    detect=has_all("img_in", "vector_in.in_layer", "double_blocks.0.img_attn.qkv"),
    blocks=BLOCKS,
    layers=own_names(_LAYERS),
    aliases=_LAYERS + NORMS + FUSED + _OTHERS,
    excludes=_EXCLUDES,
    hidden="img_in",
    base_versions=("flux1", "flux_kontext", "flux.1", "flux.1_kontext"),
    modelspec=("flux-1-dev", "flux-1-schnell", "flux-1", "Flux.1-dev", "Flux.1-fill-dev"),
    prefixes={"diffusers": {"model": "transformer."}},
    keep=_KEEP,
    groups=GROUPS,
)


_LONGCAT = (*_ENDS, *embedders("time_embed.timestep_embedder.", "time_in."), *DOUBLE, *SINGLE)
LONGCAT = ArchSpec(
    id="longcat_image",
    title="LongCat-Image",
    detect=lambda shapes: (
        _has_modulation(shapes)
        and "double_blocks.0.img_mlp.0" in shapes
        and "vector_in.in_layer" not in shapes
    ),
    blocks=BLOCKS,
    layers=own_names(_LONGCAT),
    aliases=_LONGCAT + NORMS + FUSED,
    excludes=_EXCLUDES,
    hidden="img_in",
    keep=_KEEP,
    groups=GROUPS,
)

_OVIS = (
    *_ENDS,
    *embedders("timestep_embedder.", "time_in."),
    *(alias for alias in DOUBLE if "_mlp" not in alias.own),
    *double({"ff.net.2": "img_mlp.down_proj", "ff_context.net.2": "txt_mlp.down_proj"}),
    *SINGLE,
)
_OVIS_GATES = tuple(
    Alias(
        f"transformer_blocks.{{}}.{theirs}.net.0.proj",
        f"double_blocks.{{}}.{stream}_mlp.gate_proj",
        refuse="gate and value are two layers here and one in the file",
    )
    for theirs, stream in (("ff", "img"), ("ff_context", "txt"))
)
OVIS = ArchSpec(
    id="ovis_image",
    title="Ovis-Image",
    detect=lambda shapes: _has_modulation(shapes) and "double_blocks.0.img_mlp.gate_proj" in shapes,
    blocks=BLOCKS,
    layers=(
        *own_names(_OVIS),
        *(f"double_blocks.{{}}.{s}_mlp.{x}_proj" for s in STREAMS for x in ("gate", "up")),
    ),
    aliases=_OVIS + _OVIS_GATES + NORMS + aliases("", "", {"context_embedder_norm": "txt_norm"}),
    excludes=_EXCLUDES,
    hidden="img_in",
    keep=_KEEP,
    groups=GROUPS,
)
