"""The CLIP text encoders of SD1.5 (L), SDXL (L and G) and FLUX.1 (L)."""

from __future__ import annotations

from .base import ArchSpec

_BLOCK = "text_model.encoder.layers.{}."
_LEAVES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip

CLIP = ArchSpec(
    id="clip",
    title="CLIP",
    detect=lambda shapes: False,
    blocks=(r"text_model\.encoder\.layers\.\d+",),
    layers=(*(_BLOCK + leaf for leaf in _LEAVES), "text_projection"),
    parts=("clip_l", "clip_g"),
)
