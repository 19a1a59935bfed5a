"""CogVideoX 1.0 and 1.5."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same

_THEIRS, _OWN = "transformer_blocks.{}.", "blocks.{}."
_LAYERS = (
    *aliases("", "", {
        **same("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"),
        **{f"{m}_embedding.linear_{i}": f"{m}_embedding_linear_{i}"
           for m in ("time", "ofs") for i in (1, 2)},
    }),
    *aliases(_THEIRS, _OWN, {
        **{f"attn1.to_{x}": x for x in "qkv"},
        "attn1.to_out.0": "attn_out",
        "ff.net.0.proj": "ff_proj",
        "ff.net.2": "ff_out",
        **same("norm1.linear", "norm2.linear"),
    }),
)  # fmt: skip
_NORMS = (
    *aliases("", "", same("norm_final", "norm_out.norm", "patch_embed.pos_embedding")),
    *aliases(_THEIRS, _OWN, {
        "attn1.norm_q": "norm_q",
        "attn1.norm_k": "norm_k",
        **same("norm1.norm", "norm2.norm"),
    }),
)  # fmt: skip

COGVIDEOX = ArchSpec(
    id="cogvideox",
    title="CogVideoX",
    detect=has_all("blocks.0.norm1.linear", "blocks.0.ff_proj", "patch_embed.text_proj"),
    blocks=(r"blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*norm.*",),
    keep=(r"(?!blocks\.\d+\.).*", r".*norm.*"),
    groups={
        "attention": (*(f"blocks.*.{x}" for x in "qkv"), "*.attn_out"),
        "mlp": ("*.ff_proj", "*.ff_out"),
        "modulation": ("*.norm1.linear", "*.norm2.linear", "norm_out"),
    },
)
