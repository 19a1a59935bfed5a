"""Anima, Cosmos Predict2 (the same without Anima's text adapter) and Cosmos 1."""

from __future__ import annotations

from typing import Any

from .base import Alias, ArchSpec, Leaf, aliases, has_all, own_names, same

_ATTENTION = {f"to_{x}": f"{x}_proj" for x in "qkv"} | {"to_out.0": "output_proj"}
_KINDS = ("self_attn", "cross_attn", "mlp")  # theirs count them: norm1, attn1, ...
_LAYERS = (
    *aliases("", "", {
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
        "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
        "norm_out.linear_1": "final_layer.adaln_modulation.1",
        "norm_out.linear_2": "final_layer.adaln_modulation.2",
        "proj_out": "final_layer.linear",
    }),
    *aliases("transformer_blocks.{}.", "blocks.{}.", {
        **{
            f"attn{n}.{theirs}": f"{kind}.{own}"
            for n, kind in enumerate(_KINDS[:2], 1)
            for theirs, own in _ATTENTION.items()
        },
        **{
            f"norm{n}.linear_{i}": f"adaln_modulation_{kind}.{i}"
            for n, kind in enumerate(_KINDS, 1)
            for i in (1, 2)
        },
        "ff.net.0.proj": "mlp.layer1",
        "ff.net.2": "mlp.layer2",
    }),
)  # fmt: skip
_NORMS = (
    Alias("time_embed.norm", "t_embedding_norm"),
    *aliases("transformer_blocks.{}.", "blocks.{}.", {
        f"attn{n}.norm_{x}": f"{kind}.{x}_norm"
        for n, kind in enumerate(_KINDS[:2], 1)
        for x in "qk"
    }),
    *(
        Alias(f"learnable_pos_embed.pos_emb_{x}", f"extra_pos_embedder.pos_emb_{x}")
        for x in "thw"
    ),
)  # fmt: skip

# The text adapter is a model of its own in diffusers' pipeline, and so in its files.
_ADAPTER, _CONDITIONER = "llm_adapter.", "text_conditioner."
_ADAPTED = aliases(_CONDITIONER + "blocks.{}.", _ADAPTER + "blocks.{}.", same(
    *(f"{kind}.{x}_proj" for kind in _KINDS[:2] for x in "qkvo"), "mlp.0", "mlp.2",
), family="other") + aliases(
    _CONDITIONER, _ADAPTER, same("in_proj", "out_proj"), family="other"
)  # fmt: skip
_ADAPTED_NORMS = aliases(_CONDITIONER + "blocks.{}.", _ADAPTER + "blocks.{}.", same(
    *(f"{kind}.{x}_norm" for kind in _KINDS[:2] for x in "qk"),
    *(f"norm_{kind}" for kind in _KINDS),
), family="other") + aliases(
    _CONDITIONER, _ADAPTER, same("embed", "norm"), family="other"
)  # fmt: skip

_FIELDS: dict[str, Any] = {
    "blocks": (r"blocks\.\d+",),
    "excludes": (r".*(_modulation|_norm|_embedder|final_layer).*",),
    "keep": (r"(?!blocks\.\d+\.).*", r".*(norm|modulation).*"),
}
_GROUPS = {
    "attention": ("blocks.*.self_attn", "blocks.*.cross_attn"),
    "self_attention": ("blocks.*.self_attn",),
    "cross_attention": ("blocks.*.cross_attn",),
    "mlp": ("blocks.*.mlp",),
    "modulation": ("*adaln_modulation*",),
}
ANIMA = ArchSpec(
    id="anima",
    title="Anima",
    detect=has_all("blocks.0.mlp.layer1", "llm_adapter.blocks.0.cross_attn.q_proj"),
    layers=own_names(_LAYERS + _ADAPTED),
    aliases=_LAYERS + _NORMS + _ADAPTED + _ADAPTED_NORMS,
    base_versions=("anima",),
    modelspec=("anima-preview", "anima-unknown"),
    groups=_GROUPS | {"text_adapter": ("llm_adapter",)},
    **_FIELDS,
)
COSMOS_PREDICT2 = ArchSpec(
    id="cosmos_predict2",
    title="Cosmos Predict2",
    detect=lambda shapes: (
        "blocks.0.mlp.layer1" in shapes
        and "blocks.0.adaln_modulation_mlp.1" in shapes
        and "llm_adapter.blocks.0.cross_attn.q_proj" not in shapes
    ),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    groups=_GROUPS,
    **_FIELDS,
)

_BLOCK1 = "blocks.block{}.blocks."
_SEQUENTIAL: dict[str, Leaf] = {f"to_{x}": f"to_{x}.0" for x in ("q", "k", "v", "out")}
_SEQUENTIAL["to_out.0"] = _SEQUENTIAL.pop("to_out")
_LAYERS1 = (
    *aliases("", "", {
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
        "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.adaLN_modulation.2",
        "proj_out": "final_layer.linear",
    }),
    *aliases("transformer_blocks.{}.attn1.", _BLOCK1 + "0.block.attn.", _SEQUENTIAL),
    *aliases("transformer_blocks.{}.attn2.", _BLOCK1 + "1.block.attn.", _SEQUENTIAL),
    *aliases("transformer_blocks.{}.", _BLOCK1, {
        "ff.net.0.proj": "2.block.layer1",
        "ff.net.2": "2.block.layer2",
        **{
            f"norm{n + 1}.linear_{i}": f"{n}.adaLN_modulation.{i}"
            for n in range(3)
            for i in (1, 2)
        },
    }),
)  # fmt: skip
_NORMS1 = (
    Alias("time_embed.norm", "affline_norm"),
    *aliases("transformer_blocks.{}.", _BLOCK1, {
        f"attn{n + 1}.norm_{x}": f"{n}.block.attn.to_{x}.1" for n in (0, 1) for x in "qk"
    }),
    *_NORMS[-3:],
)  # fmt: skip
COSMOS = ArchSpec(
    id="cosmos",
    title="Cosmos 1",
    detect=has_all("blocks.block0.blocks.0.block.attn.to_q.0", "x_embedder.proj.1"),
    blocks=(r"blocks\.block\d+",),
    layers=own_names(_LAYERS1),
    aliases=_LAYERS1 + _NORMS1,
    excludes=(r".*_modulation.*",),
    keep=(r"(?!blocks\.block\d+\.).*", r".*(_modulation|attn\.to_[qk]\.1).*"),
    groups={
        "attention": ("*.block.attn",),
        "self_attention": ("*.blocks.0.block.attn",),
        "cross_attention": ("*.blocks.1.block.attn",),
        "mlp": ("*.blocks.2.block",),
        "modulation": ("*.adaLN_modulation",),
    },
)
