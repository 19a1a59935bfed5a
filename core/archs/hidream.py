"""HiDream-I1: diffusers keeps the released names; MLPs of four experts and a shared one."""

from __future__ import annotations

from .base import ArchSpec, has_all

_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
_W = ("w1", "w2", "w3")
_SHARED = (
    "adaLN_modulation.1",
    *(f"attn1.{name}" for name in _ATTENTION),
    *(f"ff_i.{part}.{w}" for part in ("shared_experts", "experts.{}") for w in _W),
)
_TEXT = (*(f"attn1.{name}_t" for name in _ATTENTION), *(f"ff_t.{w}" for w in _W))
_ENDS = (
    *(f"t_embedder.timestep_embedder.linear_{i}" for i in (1, 2)),
    *(f"p_embedder.pooled_embedder.linear_{i}" for i in (1, 2)),
    "x_embedder.proj", "caption_projection.{}.linear",
    "final_layer.linear", "final_layer.adaLN_modulation.1",
)  # fmt: skip

HIDREAM = ArchSpec(
    id="hidream",
    title="HiDream-I1",
    detect=has_all("caption_projection.0.linear", "double_stream_blocks.0.block.attn1.to_q"),
    blocks=(r"double_stream_blocks\.\d+", r"single_stream_blocks\.\d+"),
    layers=(
        *_ENDS,
        *(f"double_stream_blocks.{{}}.block.{leaf}" for leaf in (*_SHARED, *_TEXT)),
        *(f"single_stream_blocks.{{}}.block.{leaf}" for leaf in _SHARED),
    ),
    excludes=(r".*(adaLN_modulation|norm|ff_i\.gate).*",),
    base_versions=("hidream_i1",),
    modelspec=("hidream-i1",),
    keep=(
        r"((t|p|x)_embedder|caption_projection|final_layer)\..+",
        r".*(adaLN_modulation|norm|ff_i\.gate).*",
    ),
    groups={
        "double": ("double_stream_blocks.*",),
        "single": ("single_stream_blocks.*",),
        "attention": ("*.attn1.*",),
        "mlp": ("*.ff_i.*", "*.ff_t.*"),
        "modulation": ("*.adaLN_modulation.*",),
        "experts": ("*.experts.*", "*.shared_experts.*"),
    },
)
