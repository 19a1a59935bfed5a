"""FLUX.1 (dev, schnell, Kontext, Fill): fused q/k/v, 19 double and 38 single blocks or fewer."""

from __future__ import annotations

from .base import Alias, ArchSpec, aliases, has_all, own_names

_LAYERS = (
    *aliases("", "", {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
    }),
    Alias(
        "norm_out.linear", "final_layer.adaLN_modulation.1",
        refuse="diffusers stores its scale and shift halves in the other order",
    ),
    *aliases("transformer_blocks.{}.", "double_blocks.{}.", {
        "attn.to_q": ("img_attn.qkv", 0, 1),
        "attn.to_k": ("img_attn.qkv", 1, 1),
        "attn.to_v": ("img_attn.qkv", 2, 1),
        "attn.add_q_proj": ("txt_attn.qkv", 0, 1),
        "attn.add_k_proj": ("txt_attn.qkv", 1, 1),
        "attn.add_v_proj": ("txt_attn.qkv", 2, 1),
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0",  # newer diffusers
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }),
    *aliases("single_transformer_blocks.{}.", "single_blocks.{}.", {
        "attn.to_q": ("linear1", 0, 1),
        "attn.to_k": ("linear1", 1, 1),
        "attn.to_v": ("linear1", 2, 1),
        "proj_mlp": ("linear1", 3, None),
        "proj_out": "linear2",
        "norm.linear": "modulation.lin",
    }),
)  # fmt: skip

_NORMS = (
    *aliases("transformer_blocks.{}.attn.", "double_blocks.{}.", {
        "norm_q": "img_attn.norm.query_norm",
        "norm_k": "img_attn.norm.key_norm",
        "norm_added_q": "txt_attn.norm.query_norm",
        "norm_added_k": "txt_attn.norm.key_norm",
    }),
    *aliases("single_transformer_blocks.{}.attn.", "single_blocks.{}.norm.", {
        "norm_q": "query_norm",
        "norm_k": "key_norm",
    }),
)  # fmt: skip

FLUX = ArchSpec(
    id="flux",
    title="FLUX.1",
    # FLUX.2 and Chroma have no vector_in, HunyuanVideo has img_in.proj instead of img_in.
    detect=has_all("img_in", "vector_in.in_layer", "double_blocks.0.img_attn.qkv"),
    blocks=(r"double_blocks\.\d+", r"single_blocks\.\d+"),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*", r".*(norm).*"),
    hidden="img_in",
    base_versions=("flux1", "flux_kontext"),
    modelspec=("flux-1-dev", "flux-1-schnell", "Flux.1-dev"),
    prefixes={"diffusers": {"model": "transformer."}},
)
