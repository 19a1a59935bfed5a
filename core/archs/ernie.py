"""ERNIE-Image: diffusers calls every layer as ComfyUI does."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same

_BLOCK = "layers.{}."
_LAYERS = aliases("", "", same(
    "x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2",
    "adaLN_modulation.1", "final_norm.linear", "final_linear",
    *(f"{_BLOCK}self_attention.to_{x}" for x in ("q", "k", "v", "out.0")),
    *(f"{_BLOCK}mlp.{x}" for x in ("gate_proj", "up_proj", "linear_fc2")),
))  # fmt: skip
_NORMS = aliases(_BLOCK, _BLOCK, same(
    "adaLN_sa_ln", "adaLN_mlp_ln", "self_attention.norm_q", "self_attention.norm_k",
))  # fmt: skip

ERNIE = ArchSpec(
    id="ernie",
    title="ERNIE-Image",
    detect=has_all("layers.0.mlp.linear_fc2", "layers.0.self_attention.to_q", "text_proj"),
    blocks=(r"layers\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    base_versions=("ernie_image",),
    keep=(r"(?!layers\.\d+\.).*", r".*(norm|_ln).*"),
    groups={
        "attention": ("*.self_attention",),
        "mlp": ("*.mlp",),
        "modulation": ("adaLN_modulation", "final_norm"),
    },
)
