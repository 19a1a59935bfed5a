"""HiDream-O1: a Qwen3-VL that predicts pixels."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, same

_TEXT, _VISUAL = "language_model.layers.{}.", "visual.blocks.{}."
_LAYERS = (
    *(f"{_TEXT}self_attn.{x}_proj" for x in "qkvo"),
    *(f"{_TEXT}mlp.{x}_proj" for x in ("gate", "up", "down")),
    *(_VISUAL + leaf for leaf in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")),
    "visual.patch_embed.proj", "visual.merger.linear_fc1", "visual.merger.linear_fc2",
    "t_embedder1.mlp.0", "t_embedder1.mlp.2", "x_embedder.proj1", "x_embedder.proj2",
    "final_layer2.linear",
)  # fmt: skip
_OTHERS = (
    "language_model.embed_tokens", "language_model.norm", "visual.pos_embed", "visual.merger.norm",
    *(_TEXT + leaf for leaf in ("input_layernorm", "post_attention_layernorm")),
    *(f"{_TEXT}self_attn.{x}_norm" for x in "qk"),
    *(f"{_VISUAL}norm{i}" for i in (1, 2)),
)  # fmt: skip

HIDREAM_O1 = ArchSpec(
    id="hidream_o1",
    title="HiDream-O1",
    detect=has_all("t_embedder1.mlp.0", "x_embedder.proj1", "final_layer2.linear"),
    blocks=(r"language_model\.layers\.\d+",),
    layers=_LAYERS,
    # transformers' class holds the model beside the head of the language model.
    aliases=aliases("model.", "", same(*_LAYERS, *_OTHERS), family="original"),
    excludes=(r".*(embed_tokens|lm_head).*",),
    also=(r"x_embedder\.proj\d", r"final_layer2\.linear"),
    base_versions=("hidream_o1_image", "hidream_o1"),
    modelspec=("HiDream-O1-Image",),
    families={"musubi": "original"},
    keep=(
        r"(t_embedder1|x_embedder|final_layer2)\..+",
        r".*(norm|rotary|pos_embed|embed_tokens|lm_head).*",
    ),
    groups={
        "attention": ("*.self_attn", "visual.*.attn"),
        "mlp": ("*layers.*.mlp", "visual.*.mlp"),
        "modulation": ("t_embedder1",),
        "language": ("language_model",),
        "visual": ("visual",),
        "pixel": ("x_embedder", "final_layer2"),
    },
)
