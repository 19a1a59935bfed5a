"""ACE-Step 1.5 (a decoder with an encoder of text, lyrics and timbre beside it) and 1.0: music."""

from __future__ import annotations

from .base import Alias, ArchSpec, Leaf, aliases, has_all, own_names, same

_ATTENTIONS = ("self_attn", "cross_attn")
_MLP = tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
_TIMES = tuple(
    f"{name}.{leaf}" for name in ("time_embed", "time_embed_r")
    for leaf in ("linear_1", "linear_2", "time_proj")
)  # fmt: skip
_LAYER: dict[str, Leaf] = {
    f"{kind}.{theirs}": f"{kind}.{own}"
    for kind in _ATTENTIONS
    for theirs, own in {**{f"to_{x}": f"{x}_proj" for x in "qkv"}, "to_out.0": "o_proj"}.items()
}
_LAYERS = (
    *aliases("", "decoder.", {
        "proj_in_conv": "proj_in.1",
        **same("condition_embedder", *_TIMES),
    }),
    *aliases("layers.{}.", "decoder.layers.{}.", _LAYER | same(*_MLP)),
)  # fmt: skip
_NORMS = (
    # A transposed convolution, whose weight has its outputs second: no layer for adapters.
    *aliases("", "decoder.", {"proj_out_conv": "proj_out.1"}),
    *aliases("", "decoder.", same("scale_shift_table", "norm_out")),
    *aliases("layers.{}.", "decoder.layers.{}.", {
        f"{kind}.norm_{x}": f"{kind}.{x}_norm" for kind in _ATTENTIONS for x in "qk"
    }),
    *aliases("layers.{}.", "decoder.layers.{}.", same(
        "scale_shift_table", *(f"{kind}_norm" for kind in (*_ATTENTIONS, "mlp"))
    )),
)  # fmt: skip
# The released trainer wraps the decoder alone, whose names do without the first one.
_ORIGINAL = tuple(
    Alias(row.own.removeprefix("decoder."), row.own, family="original")
    for row in _LAYERS + _NORMS
    if row.own != f"decoder.{row.theirs}"
)
_STACKS = (
    "encoder.lyric_encoder.", "encoder.timbre_encoder.", "tokenizer.attention_pooler.",
    "detokenizer.",
)  # fmt: skip
_OWN = (
    *(f"{stack}layers.{{}}.self_attn.{x}_proj" for stack in _STACKS for x in "qkvo"),
    *(f"{stack}layers.{{}}.{leaf}" for stack in _STACKS for leaf in _MLP),
    *(stack + "embed_tokens" for stack in _STACKS),
    "encoder.text_projector", "tokenizer.audio_acoustic_proj", "detokenizer.proj_out",
    "tokenizer.quantizer.project_in", "tokenizer.quantizer.project_out",
)  # fmt: skip

ACE_STEP15 = ArchSpec(
    id="ace_step15",
    title="ACE-Step 1.5",
    detect=has_all("decoder.layers.0.cross_attn.q_proj", "encoder.text_projector"),
    blocks=(r"decoder\.layers\.\d+",),
    layers=own_names(_LAYERS) + _OWN,
    aliases=_LAYERS + _NORMS + _ORIGINAL,
    base_versions=("ace_step_15", "ace_step_15_xl"),
    keep=(r"(?!decoder\.layers\.\d+\.).*", r".*(norm|scale_shift_table).*"),
    groups={
        "attention": ("*.self_attn", "*.cross_attn"),
        "self_attention": ("decoder.*.self_attn",),
        "cross_attention": ("decoder.*.cross_attn",),
        "mlp": ("*.mlp",),
        "modulation": ("decoder.time_embed*", "*.scale_shift_table"),
        "decoder": ("decoder",),
        "encoder": ("encoder",),
    },
)

_BLOCK = "transformer_blocks.{}."
_LYRICS = "lyric_encoder.encoders.{}."
_LAYERS1 = (
    "proj_in.early_conv_layers.0", "proj_in.early_conv_layers.2", "speaker_embedder",
    "genre_embedder", "lyric_proj", "lyric_encoder.embed.out.0", "t_block.1", "final_layer.linear",
    "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    *(f"{_BLOCK}{kind}.to_{x}" for kind in ("attn", "cross_attn")
      for x in ("q", "k", "v", "out.0")),
    *(f"{_BLOCK}cross_attn.add_{x}_proj" for x in "qkv"), _BLOCK + "cross_attn.to_add_out",
    *(f"{_BLOCK}ff.{x}_conv.conv" for x in ("inverted", "depth", "point")),
    *(f"{_LYRICS}self_attn.linear_{x}" for x in ("q", "k", "v", "out", "pos")),
    _LYRICS + "feed_forward.w_1", _LYRICS + "feed_forward.w_2",
    *(f"projectors.{{}}.{i}" for i in (0, 2, 4)),
)  # fmt: skip
ACE_STEP = ArchSpec(
    id="ace_step",
    title="ACE-Step 1.0",
    detect=has_all("genre_embedder", "lyric_proj", "transformer_blocks.0.attn.to_q"),
    blocks=(r"transformer_blocks\.\d+",),
    layers=_LAYERS1,
    excludes=(r".*\.ff\..*",),  # as the released trainer: attention alone
    keep=(r"(?!transformer_blocks\.\d+\.).*", r".*(norm|scale_shift_table|depth_conv).*"),
    groups={
        "attention": ("transformer_blocks.*attn",),
        "self_attention": ("*.attn",),
        "cross_attention": ("*.cross_attn",),
        "mlp": ("*.ff",),
        "modulation": ("t_block", "*scale_shift_table"),
        "lyrics": ("lyric_*",),
    },
)
