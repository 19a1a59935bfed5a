"""LTX-Video and LTX-2 (with sound): the same names, LTX-2 with a second stream for audio."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Alias, ArchSpec, Leaf, aliases, own_names, same

_BLOCK = "transformer_blocks.{}."
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_NORMS = {"norm_q": "q_norm", "norm_k": "k_norm"}
_CROSS = ("audio_to_video_attn", "video_to_audio_attn")


def _embedders(names: dict[str, str]) -> tuple[Alias, ...]:
    """Their name of a module of ``_EMBEDDER`` layers -> own name."""
    return tuple(
        Alias(f"{theirs}.{leaf}", f"{own}.{leaf}")
        for theirs, own in names.items()
        for leaf in _EMBEDDER
    )


def _block(prefix: str, *attentions: str, gated: bool = False) -> tuple[Alias, ...]:
    """Attentions and MLP of one stream; ``prefix`` is before "attn1" and "ff"."""
    leaves = [*_ATTENTION, *(["to_gate_logits"] if gated else [])]
    names = [*(f"{prefix}attn{i}" for i in (1, 2)), *attentions]
    found = [f"{name}.{leaf}" for name in names for leaf in leaves]
    mlp = [f"{prefix}ff.net.0.proj", f"{prefix}ff.net.2"]
    return aliases(_BLOCK, _BLOCK, same(*found, *mlp))


def _block_norms(prefix: str, *attentions: str) -> tuple[Alias, ...]:
    names = [*(f"{prefix}attn{i}" for i in (1, 2)), *attentions]
    leaves: dict[str, Leaf] = {
        f"{name}.{theirs}": f"{name}.{own}" for name in names for theirs, own in _NORMS.items()
    }
    return aliases(_BLOCK, _BLOCK, leaves | same(f"{prefix}scale_shift_table"))


def _connectors(leaves: Mapping[str, Leaf], *own: str) -> tuple[Alias, ...]:
    """Aliases below the blocks, and ``own`` beside them, of the two connectors.

    They are a model of their own in diffusers' pipeline, and so in its files.
    """
    found: list[Alias] = []
    for stream in ("video", "audio"):
        theirs, ours = f"connectors.{stream}_connector.", f"{stream}_embeddings_connector."
        block, our_block = theirs + "transformer_blocks.{}.", ours + "transformer_1d_blocks.{}."
        found += aliases(block, our_block, leaves, family="other")
        found += aliases(theirs, ours, same(*own), family="other")
    return tuple(found)


_LAYERS = (
    *aliases("", "", {
        "proj_in": "patchify_proj",
        **same("proj_out", "caption_projection.linear_1", "caption_projection.linear_2"),
    }),
    *_embedders({"time_embed": "adaln_single"}),
)  # fmt: skip
_TABLES = aliases("", "", same("scale_shift_table"))
_AV_LAYERS = (
    *_LAYERS,
    *aliases("", "", {
        "audio_proj_in": "audio_patchify_proj",
        **same("audio_proj_out"),
        **same(*(f"audio_caption_projection.linear_{i}" for i in (1, 2))),
    }),
    *_embedders({
        "audio_time_embed": "audio_adaln_single",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
        "prompt_adaln": "prompt_adaln_single",
        "audio_prompt_adaln": "audio_prompt_adaln_single",
    }),
    *_block("", *_CROSS, gated=True),
    *_block("audio_", gated=True),
)  # fmt: skip
_AV_NORMS = (
    *_TABLES,
    *aliases("", "", same("audio_scale_shift_table")),
    *aliases(_BLOCK, _BLOCK, {
        "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
        "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
        **same("prompt_scale_shift_table", "audio_prompt_scale_shift_table"),
    }),
    *_block_norms("", *_CROSS),
    *_block_norms("audio_"),
)  # fmt: skip
_CONNECTORS = _connectors(
    {f"attn1.{leaf}": f"attn1.{leaf}" for leaf in _ATTENTION}
    | same("ff.net.0.proj", "ff.net.2")
)  # fmt: skip
_CONNECTOR_NORMS = _connectors(
    {f"attn1.{name}": f"attn1.{own}" for name, own in _NORMS.items()}, "learnable_registers"
)
_KEEP = (r"(?!transformer_blocks\.\d+\.).*", r".*(norm|scale_shift_table|to_gate_logits).*")

LTXV = ArchSpec(
    id="ltxv",
    title="LTX-Video",
    detect=lambda shapes: (
        "adaln_single.emb.timestep_embedder.linear_1" in shapes
        and "patchify_proj" in shapes
        and "audio_patchify_proj" not in shapes
    ),
    blocks=(r"transformer_blocks\.\d+",),
    layers=own_names(_LAYERS + _block("")),
    aliases=(*_LAYERS, *_block(""), *_TABLES, *_block_norms("")),
    keep=_KEEP,
    groups={
        "attention": ("*.attn1", "*.attn2"),
        "self_attention": ("*.attn1",),
        "cross_attention": ("*.attn2",),
        "mlp": ("*.ff",),
        "modulation": ("adaln_single", "*scale_shift_table"),
    },
)
LTX2 = ArchSpec(
    id="ltx2",
    title="LTX-2",
    detect=lambda shapes: "audio_patchify_proj" in shapes and "patchify_proj" in shapes,
    blocks=(r"transformer_blocks\.\d+",),
    layers=own_names(_AV_LAYERS + _CONNECTORS),
    aliases=_AV_LAYERS + _AV_NORMS + _CONNECTORS + _CONNECTOR_NORMS,
    base_versions=("ltx2", "ltx2.3", "ltx2.5"),
    keep=_KEEP,
    groups={
        "attention": ("*attn1", "*attn2", "*_attn"),
        "self_attention": ("*attn1",),
        "cross_attention": ("*attn2", "*_attn"),
        "mlp": ("*.ff", "*.audio_ff"),
        "modulation": ("*adaln_single", "*scale_shift_table*"),
        "audio": ("audio_*", "*.audio_*", "*.video_to_audio_attn"),
        "connector": ("*_embeddings_connector",),
    },
)
