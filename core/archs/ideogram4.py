"""Ideogram 4: one stream, q, k and v in one weight."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same, share

ORDER = 1  # where names alone decide between it and Z-Image, Z-Image is meant

_BLOCK = "layers.{}."
_LAYERS = (
    *aliases("", "", same(
        "input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj",
        "final_layer.linear", "final_layer.adaln_modulation",
    )),
    *aliases(_BLOCK, _BLOCK, {
        **{f"attention.to_{x}": ("attention.qkv", share(n, 3)) for n, x in enumerate("qkv")},
        "attention.to_out.0": "attention.o",
        **same(*(f"feed_forward.w{i}" for i in (1, 2, 3)), "adaln_modulation"),
    }),
)  # fmt: skip
_NORMS = (
    *aliases("", "", same("llm_cond_norm", "embed_image_indicator")),
    *aliases(_BLOCK, _BLOCK, same(
        "attention.norm_q", "attention.norm_k",
        *(f"{m}_norm{i}" for m in ("attention", "ffn") for i in (1, 2)),
    )),
)  # fmt: skip

IDEOGRAM4 = ArchSpec(
    id="ideogram4",
    title="Ideogram 4",
    detect=has_all("embed_image_indicator", "llm_cond_proj", "layers.0.attention.qkv"),
    blocks=(r"layers\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*adaln_modulation.*",),
    base_versions=("ideogram4",),
    modelspec=("Ideogram-4",),
    keep=(r"(?!layers\.\d+\.).*", r".*(norm|adaln).*"),
    groups={
        "attention": ("*.attention",),
        "mlp": ("*.feed_forward",),
        "modulation": ("*adaln_*",),
    },
)
