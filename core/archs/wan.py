"""Wan 2.1 and 2.2, text and image to video."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names

_LAYERS = (
    *aliases("", "", {"patch_embedding": "patch_embedding", "proj_out": "head.head"}),
    *aliases("condition_embedder.", "", {
        "text_embedder.linear_1": "text_embedding.0",
        "text_embedder.linear_2": "text_embedding.2",
        "time_embedder.linear_1": "time_embedding.0",
        "time_embedder.linear_2": "time_embedding.2",
        "time_proj": "time_projection.1",
        "image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "image_embedder.ff.net.2": "img_emb.proj.3",
    }),
    *aliases("blocks.{}.", "blocks.{}.", {
        "attn1.to_q": "self_attn.q",
        "attn1.to_k": "self_attn.k",
        "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_q": "cross_attn.q",
        "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v",
        "attn2.to_out.0": "cross_attn.o",
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }),
)  # fmt: skip

_NORMS = (
    *aliases("condition_embedder.image_embedder.", "img_emb.proj.", {"norm1": "0", "norm2": "4"}),
    *aliases("blocks.{}.", "blocks.{}.", {
        "norm2": "norm3",  # theirs count in the order of use
        "attn1.norm_q": "self_attn.norm_q",
        "attn1.norm_k": "self_attn.norm_k",
        "attn2.norm_q": "cross_attn.norm_q",
        "attn2.norm_k": "cross_attn.norm_k",
        "attn2.norm_added_k": "cross_attn.norm_k_img",
    }),
)  # fmt: skip

WAN = ArchSpec(
    id="wan",
    title="Wan",
    detect=has_all("patch_embedding", "blocks.0.self_attn.q", "blocks.0.ffn.0", "head.head"),
    blocks=(r"blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    base_versions=("wan",),
    modelspec=("wan2.1",),
    prefixes={"diffusers": {"model": "transformer."}},
)
