"""Lens: two streams in every block, each with q, k and v in one weight."""

from __future__ import annotations

from .base import ArchSpec, has_all

_BLOCK = "transformer_blocks.{}."

LENS = ArchSpec(
    id="lens",
    title="Lens",
    detect=has_all("transformer_blocks.0.attn.img_qkv", "transformer_blocks.0.img_mlp.w1"),
    blocks=(r"transformer_blocks\.\d+",),
    layers=(
        "img_in", "txt_in", "norm_out.linear", "proj_out",
        *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
        *(f"{_BLOCK}attn.{leaf}" for leaf in ("img_qkv", "txt_qkv", "to_out.0", "to_add_out")),
        *(f"{_BLOCK}{m}_{leaf}" for m in ("img", "txt")
          for leaf in ("mod.1", "mlp.w1", "mlp.w2", "mlp.w3")),
    ),
    excludes=(r".*_mod\..*",),
    keep=(r"(?!transformer_blocks\.\d+\.).*", r".*(norm|_mod\.).*"),
    groups={
        "attention": ("*.attn",),
        "mlp": ("*_mlp",),
        "modulation": ("*_mod", "norm_out"),
        "image": ("*.img_*", "*.attn.to_out"),
        "text": ("*.txt_*", "*.attn.to_add_out"),
    },
)  # fmt: skip
