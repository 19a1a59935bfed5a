"""Mochi 1: blocks of two widths, image (x) and text (y), with gated MLPs."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, share, swapped

_BLOCK, _OWN = "transformer_blocks.{}.", "blocks.{}."
_QKV = {"attn1.to_{}": "attn.qkv_x", "attn1.add_{}_proj": "attn.qkv_y"}

_LAYERS = (
    *aliases("", "", {
        "patch_embed.proj": "x_embedder.proj",
        "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.pooler.to_kv": "t5_y_embedder.to_kv",
        "time_embed.pooler.to_q": "t5_y_embedder.to_q",
        "time_embed.pooler.to_out": "t5_y_embedder.to_out",
        "time_embed.caption_proj": "t5_yproj",
        "proj_out": "final_layer.linear",
    }),
    *aliases("", "", {"norm_out.linear": "final_layer.mod"}, order=swapped),
    *aliases(_BLOCK, _OWN, {
        **{theirs.format(x): (own, share(i, 3))
           for theirs, own in _QKV.items() for i, x in enumerate("qkv")},
        "attn1.to_out.0": "attn.proj_x",
        "attn1.to_add_out": "attn.proj_y",
        "ff.net.2": "mlp_x.w2",
        "ff_context.net.2": "mlp_y.w2",
        "norm1.linear": "mod_x",
        "norm1_context.linear": "mod_y",
        "norm1_context.linear_1": "mod_y",  # the last block's
    }),
    # Gate and value the other way round.
    *aliases(_BLOCK, _OWN, {
        "ff.net.0.proj": "mlp_x.w1",
        "ff_context.net.0.proj": "mlp_y.w1",
    }, order=swapped),
)  # fmt: skip
_NORMS = (
    *aliases("", "", {"pos_frequencies": "pos_frequencies"}),
    *aliases(_BLOCK + "attn1.norm_", _OWN + "attn.", {
        f"{added}{x}": f"{x}_norm_{y}" for added, y in (("", "x"), ("added_", "y")) for x in "qk"
    }),
)  # fmt: skip

MOCHI = ArchSpec(
    id="mochi",
    title="Mochi",
    detect=has_all("x_embedder.proj", "t5_yproj", "blocks.0.attn.qkv_x"),
    blocks=(r"blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*(mod_x|mod_y|norm).*",),
    hidden="x_embedder.proj",
    keep=(
        r"(pos_frequencies|t5_yproj|(x|t|t5_y)_embedder\..+|final_layer\..+)",
        r".*(mod_x|mod_y|norm).*",
    ),
    groups={
        "image": ("blocks.*_x", "blocks.*.mlp_x.*"),
        "text": ("blocks.*_y", "blocks.*.mlp_y.*"),
        "attention": ("*.attn.*",),
        "mlp": ("*.mlp_?.*",),
        "modulation": ("*.mod_?",),
    },
)
