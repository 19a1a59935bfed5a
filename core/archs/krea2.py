"""Krea 2: one stream, keys and values with fewer heads, a transformer that fuses text layers."""

from __future__ import annotations

from .base import Alias, ArchSpec, aliases, has_all, own_names

_STACKS = {
    "transformer_blocks.{}.": "blocks.{}.",
    **{f"text_fusion.{x}_blocks.{{}}.": f"txtfusion.{x}_blocks.{{}}."
       for x in ("layerwise", "refiner")},
}  # fmt: skip
_BLOCK = {f"attn.to_{x}": f"attn.w{x}" for x in "qkv"} | {
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    **{f"ff.{x}": f"mlp.{x}" for x in ("gate", "up", "down")},
}
_BLOCK_NORMS = {
    "norm1": "prenorm.scale",
    "norm2": "postnorm.scale",
    "attn.norm_q": "attn.qknorm.qnorm.scale",
    "attn.norm_k": "attn.qknorm.knorm.scale",
}
_LAYERS = (
    *aliases("", "", {
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear",
    }),
    *(alias for theirs, own in _STACKS.items() for alias in aliases(theirs, own, _BLOCK)),
)  # fmt: skip
_NORMS = (
    *aliases("", "", {
        "txt_in.norm": "txtmlp.0.scale",
        "final_layer.norm": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
    }),
    *(alias for theirs, own in _STACKS.items() for alias in aliases(theirs, own, _BLOCK_NORMS)),
    Alias(
        "transformer_blocks.{}.scale_shift_table", "blocks.{}.mod.lin",
        refuse="it is stored as one vector here and as a table there",
    ),
)  # fmt: skip
# Some tools write the output projection without its place in diffusers' list.
_SHORT = tuple(
    alias for theirs, own in _STACKS.items()
    for alias in aliases(theirs, own, {"attn.to_out": "attn.wo"}, family="other")
)  # fmt: skip

KREA2 = ArchSpec(
    id="krea2",
    title="Krea 2",
    detect=has_all("txtfusion.projector", "blocks.0.attn.wq", "first"),
    blocks=(r"blocks\.\d+", r"txtfusion\.(layerwise|refiner)_blocks\.\d+"),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS + _SHORT,
    also=(".*",),
    base_versions=("krea2",),
    modelspec=("Krea-2",),
    keep=(r"(?!blocks\.\d+\.).*", r".*(\.mod\.|norm).*"),
    groups={
        "attention": ("*.attn",),
        "mlp": ("*.mlp",),
        "modulation": ("*.mod", "tproj", "last.modulation"),
        "single": ("blocks",),
        "text": ("txtfusion", "txtmlp"),
    },
)
