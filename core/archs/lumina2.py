"""Z-Image and Lumina Image 2.0: one transformer, two spellings in diffusers.

The fused weight of q, k and v has hidden-size rows for q; Lumina's k and v share heads and have
a third of that each, Z-Image's have as many.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Alias, ArchSpec, Leaf, Shapes, aliases, grouped, own_names, same

_STACKS = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.", "siglip_refiner.{}.")
_MODULATED = _STACKS[:2]


def _stacks(leaves: Mapping[str, Leaf], stacks: tuple[str, ...] = _STACKS) -> tuple[Alias, ...]:
    return tuple(alias for stack in stacks for alias in aliases(stack, stack, leaves))


def _attention(name: str) -> dict[str, Leaf]:
    """``name``: of the attention module in diffusers."""
    parts: dict[str, Leaf] = {
        f"{name}.to_{x}": ("attention.qkv", grouped(n)) for n, x in enumerate("qkv")
    }
    return parts | {f"{name}.to_out.0": "attention.out"}


def _attention_norms(name: str) -> dict[str, Leaf]:
    return {f"{name}.norm_{x}": f"attention.{x}_norm" for x in "qk"}


_Z_LAYERS = (
    *aliases("", "", {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        **same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "siglip_embedder.1"),
    }),
    *_stacks(_attention("attention")),
    *_stacks(same(*(f"feed_forward.w{i}" for i in (1, 2, 3)))),
    *_stacks(same("adaLN_modulation.0"), _MODULATED),
)  # fmt: skip
_Z_NORMS = (
    *aliases("", "", same(
        "cap_embedder.0", "siglip_embedder.0", "x_pad_token", "cap_pad_token", "siglip_pad_token",
    )),
    *_stacks(_attention_norms("attention")),
    *_stacks(same(*(f"{m}_norm{i}" for m in ("attention", "ffn") for i in (1, 2)))),
)  # fmt: skip
_Z_OWN = (  # of the variant without an autoencoder
    "dec_net.cond_embed", "dec_net.input_embedder.embedder.0", "dec_net.final_layer.linear",
    *(f"dec_net.res_blocks.{{}}.{leaf}" for leaf in ("mlp.0", "mlp.2", "adaLN_modulation.1")),
)  # fmt: skip

_LUMINA_LAYERS = (
    *aliases("", "", {
        **same("x_embedder"),
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }),
    *_stacks(_attention("attn"), _STACKS[:3]),
    *_stacks({f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)}, _STACKS[:3]),
    *_stacks({"norm1.linear": "adaLN_modulation.1"}, _MODULATED),
)  # fmt: skip
_LUMINA_NORMS = (
    Alias("time_caption_embed.caption_embedder.0", "cap_embedder.0"),
    *_stacks(_attention_norms("attn"), _STACKS[:3]),
    *_stacks({"norm2": "attention_norm2", **same("ffn_norm1", "ffn_norm2")}, _STACKS[:3]),
    *_stacks({"norm1.norm": "attention_norm1"}, _MODULATED),
    *_stacks({"norm1": "attention_norm1"}, ("context_refiner.{}.",)),
)
_LUMINA_OWN = ("clip_text_pooled_proj.1", "time_text_embed.1")  # NewBie


def _is_lumina(shapes: Shapes) -> bool:
    return "cap_embedder.1" in shapes and "noise_refiner.0.attention.qkv" in shapes


_BLOCKS = tuple(rf"{name}\.\d+" for name in ("layers", "noise_refiner", "context_refiner"))
_KEEP = (
    r"(?!(layers|(noise|context|siglip)_refiner)\.\d+\.).*", r".*(_modulation|norm).*",
)  # fmt: skip
_GROUPS = {
    "attention": ("*.attention",),
    "mlp": ("*.feed_forward",),
    "modulation": ("*.adaLN_modulation",),
    "layers": ("layers",),
    "refiner": ("*_refiner",),
}

Z_IMAGE = ArchSpec(
    id="z_image",
    title="Z-Image",
    detect=lambda shapes: _is_lumina(shapes) and "layers.0.adaLN_modulation.0" in shapes,
    blocks=_BLOCKS,
    layers=own_names(_Z_LAYERS) + _Z_OWN,
    aliases=_Z_LAYERS + _Z_NORMS,
    excludes=(r".*(_modulation|_refiner).*",),
    hidden="x_embedder",
    base_versions=("z_image", "zimage"),
    modelspec=("Z-Image",),
    families={"musubi": "diffusers"},
    keep=_KEEP,
    groups=_GROUPS,
)
LUMINA2 = ArchSpec(
    id="lumina2",
    title="Lumina 2",
    detect=lambda shapes: _is_lumina(shapes) and "layers.0.adaLN_modulation.1" in shapes,
    blocks=_BLOCKS,
    layers=own_names(_LUMINA_LAYERS) + _LUMINA_OWN,
    aliases=_LUMINA_LAYERS + _LUMINA_NORMS,
    hidden="x_embedder",
    base_versions=("lumina2",),
    modelspec=("lumina-2", "lumina"),
    keep=_KEEP,
    groups=_GROUPS,
)
