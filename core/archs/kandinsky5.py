"""Kandinsky 5, image and video: every layer has the same name everywhere."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same

_TEXT, _VISUAL = "text_transformer_blocks.{}.", "visual_transformer_blocks.{}."
_ATTENTION = ("to_query", "to_key", "to_value", "out_layer")
_MLP = ("feed_forward.in_layer", "feed_forward.out_layer")
_LAYERS = aliases("", "", same(
    *(f"{name}_embeddings.in_layer" for name in ("time", "text", "pooled_text", "visual")),
    "time_embeddings.out_layer", "out_layer.modulation.out_layer", "out_layer.out_layer",
    *(f"{_TEXT}self_attention.{leaf}" for leaf in _ATTENTION),
    *(f"{_VISUAL}{kind}_attention.{leaf}" for kind in ("self", "cross") for leaf in _ATTENTION),
    *(block + leaf for block in (_TEXT, _VISUAL) for leaf in _MLP),
    _TEXT + "text_modulation.out_layer", _VISUAL + "visual_modulation.out_layer",
))  # fmt: skip
_NORMS = aliases("", "", same(
    "text_embeddings.norm", "pooled_text_embeddings.norm",
    *(f"{_TEXT}self_attention.{x}_norm" for x in ("query", "key")),
    *(f"{_VISUAL}{kind}_attention.{x}_norm" for kind in ("self", "cross")
      for x in ("query", "key")),
))  # fmt: skip

KANDINSKY5 = ArchSpec(
    id="kandinsky5",
    title="Kandinsky 5",
    detect=has_all(
        "visual_transformer_blocks.0.cross_attention.to_query", "visual_embeddings.in_layer"
    ),
    blocks=(r"text_transformer_blocks\.\d+", r"visual_transformer_blocks\.\d+"),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*modulation.*",),
    base_versions=("kandinsky5",),
    modelspec=("Kandinsky-5",),
    keep=(r"(?!(text|visual)_transformer_blocks\.\d+\.).*", r".*(norm|modulation).*"),
    groups={
        "attention": ("*_attention",),
        "self_attention": ("*.self_attention",),
        "cross_attention": ("*.cross_attention",),
        "mlp": ("*.feed_forward",),
        "modulation": ("*modulation",),
        "text": ("text_transformer_blocks",),
        "visual": ("visual_transformer_blocks",),
    },
)  # fmt: skip
