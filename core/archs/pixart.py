"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, share

_BLOCK, _OWN = "transformer_blocks.{}.", "blocks.{}."
_EMBEDDERS = (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar"))

_LAYERS = (
    *aliases("", "", {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
        **{f"adaln_single.emb.{theirs}_embedder.linear_{i + 1}": f"{own}_embedder.mlp.{2 * i}"
           for theirs, own in _EMBEDDERS for i in (0, 1)},
    }),
    *aliases(_BLOCK, _OWN, {
        "attn1.to_q": ("attn.qkv", share(0, 3)),
        "attn1.to_k": ("attn.qkv", share(1, 3)),
        "attn1.to_v": ("attn.qkv", share(2, 3)),
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_k": ("cross_attn.kv_linear", share(0, 2)),
        "attn2.to_v": ("cross_attn.kv_linear", share(1, 2)),
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }),
)  # fmt: skip
_PARAMETERS = (
    *aliases("", "", {
        "scale_shift_table": "final_layer.scale_shift_table",
        "caption_projection.y_embedding": "y_embedder.y_embedding",
    }),
    *aliases(_BLOCK, _OWN, {
        "scale_shift_table": "scale_shift_table",
        "attn1.q_norm": "attn.q_norm",
        "attn1.k_norm": "attn.k_norm",
    }),
)  # fmt: skip

PIXART = ArchSpec(
    id="pixart",
    title="PixArt",
    detect=has_all("t_block.1", "y_embedder.y_proj.fc1", "blocks.0.cross_attn.kv_linear"),
    blocks=(r"blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _PARAMETERS,
    hidden="x_embedder.proj",
    base_versions=("pixart",),
    modelspec=("pixart-sigma", "pixart-alpha"),
    keep=(
        r"(t_block|(x|t|y|csize|ar)_embedder|final_layer)\..+",
        r".*(scale_shift_table|[qk]_norm)",
    ),
    groups={
        "attention": ("*.attn.*", "*.cross_attn.*"),
        "mlp": ("*.mlp.*",),
        "modulation": ("t_block.*", "*.scale_shift_table"),
    },
)
