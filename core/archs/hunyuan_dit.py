"""HunyuanDiT 1.0 to 1.2: a transformer with skip connections."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, share, swapped

_BLOCK = "blocks.{}."
_POOLER = {f"{x}_proj": f"{x}_proj" for x in "kqvc"}

_LAYERS = (
    *aliases("", "", {
        "pos_embed.proj": "x_embedder.proj",
        "text_embedder.linear_1": "mlp_t5.0",
        "text_embedder.linear_2": "mlp_t5.2",
        "time_extra_emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_extra_emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_extra_emb.extra_embedder.linear_1": "extra_embedder.0",
        "time_extra_emb.extra_embedder.linear_2": "extra_embedder.2",
        "proj_out": "final_layer.linear",
    }),
    *aliases("time_extra_emb.pooler.", "pooler.", _POOLER),
    *aliases("", "", {"norm_out.linear": "final_layer.adaLN_modulation.1"}, order=swapped),
    *aliases(_BLOCK, _BLOCK, {
        "attn1.to_q": ("attn1.Wqkv", share(0, 3)),
        "attn1.to_k": ("attn1.Wqkv", share(1, 3)),
        "attn1.to_v": ("attn1.Wqkv", share(2, 3)),
        "attn1.to_out.0": "attn1.out_proj",
        "attn2.to_q": "attn2.q_proj",
        "attn2.to_k": ("attn2.kv_proj", share(0, 2)),
        "attn2.to_v": ("attn2.kv_proj", share(1, 2)),
        "attn2.to_out.0": "attn2.out_proj",
        "norm1.linear": "default_modulation.1",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "skip_linear": "skip_linear",
    }),
)  # fmt: skip
_PARAMETERS = (
    *aliases("", "", {
        "time_extra_emb.pooler.positional_embedding": "pooler.positional_embedding",
        "time_extra_emb.style_embedder": "style_embedder",
        "text_embedding_padding": "text_embedding_padding",
    }),
    # Not norm2 and norm3: theirs are each other's, and a name of the model itself goes first.
    *aliases(_BLOCK, _BLOCK, {
        "norm1.norm": "norm1",
        "skip_norm": "skip_norm",
        **{f"attn{i}.norm_{x}": f"attn{i}.{x}_norm" for i in (1, 2) for x in "qk"},
    }),
)  # fmt: skip

HUNYUAN_DIT = ArchSpec(
    id="hunyuan_dit",
    title="HunyuanDiT",
    detect=has_all("mlp_t5.0", "x_embedder.proj", "blocks.0.attn1.Wqkv"),
    blocks=(r"blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _PARAMETERS,
    excludes=(r".*(norm|default_modulation).*",),
    hidden="x_embedder.proj",
    keep=(
        r"(text_embedding_padding|style_embedder)",
        r"(mlp_t5|pooler|extra_embedder|(x|t)_embedder|final_layer)\..+",
        r".*(norm|default_modulation).*",
    ),
    groups={
        "attention": ("*.attn1.*", "*.attn2.*"),
        "mlp": ("*.mlp.*",),
        "modulation": ("*.default_modulation.*",),
        "skip": ("*.skip_linear",),
    },
)
