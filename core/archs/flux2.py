"""FLUX.2 (dev, klein): modulation shared by all blocks, gated MLPs, fused single blocks."""

from __future__ import annotations

from dataclasses import replace

from .base import ArchSpec, aliases, has_all, own_names, swapped
from .streams import ATTENTION, BLOCKS, FUSED, GROUPS, NORMS, double, embedders, single

_MODULATIONS = (
    "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
)  # fmt: skip
_LAYERS = (
    *aliases("", "", {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        **{f"{name}.linear": f"{name}.lin" for name in _MODULATIONS},
    }),
    *aliases("", "", {"norm_out.linear": "final_layer.adaLN_modulation.1"}, order=swapped),
    *embedders("time_guidance_embed.timestep_embedder.", "time_in."),
    *embedders("time_guidance_embed.guidance_embedder.", "guidance_in."),
    *ATTENTION,
    *double({
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }),
    *single({"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
)  # fmt: skip
# Some tools cut the first letters off together with "transformer.".
_CUT = tuple(
    replace(alias, theirs=alias.theirs.replace("transformer_", "sformer_"), family="other")
    for alias in (*_LAYERS, *NORMS)
    if alias.theirs.startswith("transformer_")
)

FLUX2 = ArchSpec(
    id="flux2",
    title="FLUX.2",
    detect=has_all("img_in", "double_stream_modulation_img.lin", "double_blocks.0.img_attn.qkv"),
    blocks=BLOCKS,
    layers=own_names(_LAYERS),
    aliases=_LAYERS + NORMS + FUSED + _CUT,
    excludes=(r".*(norm).*",),
    hidden="img_in",
    base_versions=(
        "flux_2_dev", "flux_2_klein_4b", "flux_2_klein_9b", "flux2", "flux2_klein_4b",
        "flux2_klein_9b",
    ),
    modelspec=("Flux.2-dev", "Flux.2-klein-4b", "Flux.2-klein-9b", "Flux.2"),
    keep=(r"(img_in|txt_in|(time|guidance)_in\..+|final_layer\..+)", r".*(norm|_modulation).*"),
    groups={name: found for name, found in GROUPS.items() if name != "modulation"}
    | {"modulation": ("*_modulation*",)},
)  # fmt: skip
