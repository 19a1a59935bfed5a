"""AuraFlow: four double layers (text first, image second), then single ones; no biases."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, swapped

_PROJECTIONS = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
_ADDED = (("add_q_proj", "q"), ("add_k_proj", "k"), ("add_v_proj", "v"), ("to_add_out", "o"))
_MLP = (("linear_1", "c_fc1"), ("linear_2", "c_fc2"), ("out_projection", "c_proj"))

_LAYERS = (
    *aliases("", "", {
        "pos_embed.proj": "init_x_linear",
        "context_embedder": "cond_seq_linear",
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "proj_out": "final_linear",
    }),
    *aliases("", "", {"norm_out.linear": "modF.1"}, order=swapped),
    *aliases("joint_transformer_blocks.{}.", "double_layers.{}.", {
        **{f"attn.{theirs}": f"attn.w2{own}" for theirs, own in _PROJECTIONS},
        **{f"attn.{theirs}": f"attn.w1{own}" for theirs, own in _ADDED},
        **{f"ff.{theirs}": f"mlpX.{own}" for theirs, own in _MLP},
        **{f"ff_context.{theirs}": f"mlpC.{own}" for theirs, own in _MLP},
        "norm1.linear": "modX.1",
        "norm1_context.linear": "modC.1",
    }),
    *aliases("single_transformer_blocks.{}.", "single_layers.{}.", {
        **{f"attn.{theirs}": f"attn.w1{own}" for theirs, own in _PROJECTIONS},
        **{f"ff.{theirs}": f"mlp.{own}" for theirs, own in _MLP},
        "norm1.linear": "modCX.1",
    }),
)  # fmt: skip
_PARAMETERS = aliases("", "", {
    "pos_embed.pos_embed": "positional_encoding",
    "register_tokens": "register_tokens",
})  # fmt: skip

AURAFLOW = ArchSpec(
    id="auraflow",
    title="AuraFlow",
    detect=has_all("init_x_linear", "double_layers.0.attn.w1q", "single_layers.0.attn.w1q"),
    blocks=(r"double_layers\.\d+", r"single_layers\.\d+"),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _PARAMETERS,
    excludes=(r".*\.mod(C|X|CX)\..*",),
    hidden="init_x_linear",
    base_versions=("auraflow",),
    keep=(
        r"(positional_encoding|register_tokens|init_x_linear|cond_seq_linear|t_embedder\..+)",
        r"(final_linear|modF\..+|.*\.mod(C|X|CX)\..+)",
    ),
    groups={
        "double": ("double_layers.*",),
        "single": ("single_layers.*",),
        "attention": ("*.attn.*",),
        "mlp": ("*.mlp*",),
        "modulation": ("*.mod*",),
    },
)
