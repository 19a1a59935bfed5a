"""MiniMax H3, video with sound. q, k and v are one weight, as ComfyUI reads it: one behind the
other, not head by head as in the released shards.
"""

from __future__ import annotations

from .base import Alias, ArchSpec, Leaf, aliases, has_all, own_names, same, share, swapped

_STACKS = {
    "transformer_blocks.{}.": "blocks.{}.",
    "token_refiner.refiner_blocks.{}.": "token_refiner.blocks.{}.",
}
_BLOCK: dict[str, Leaf] = {
    **{f"attn.to_{x}": ("attn.qkv_proj", share(n, 3)) for n, x in enumerate("qkv")},
    "attn.to_out.0": "attn.out_proj",
    "ff.net.2": "mlp.fc2",
}
_BLOCK_NORMS: dict[str, Leaf] = {
    "attn.norm_q": "attn.q_norm",
    "attn.norm_k": "attn.k_norm",
    **same("norm1", "norm2"),
}
_LAYERS = (
    *aliases("", "", {
        "proj_in": "video_patch_proj",
        "audio_proj_in": "audio_patch_proj",
        "context_embedder": "condition_proj",
        "time_embedder.linear_1": "time_embedder.proj_in",
        "time_embedder.linear_2": "time_embedder.proj_out",
        "norm_out.linear": "final_layer.adaln_proj.linear",
        "proj_out": "final_layer.video_out",
        "audio_proj_out": "final_layer.audio_out",
    }),
    *(alias for theirs, own in _STACKS.items() for alias in aliases(theirs, own, _BLOCK)),
    # Theirs is value and gate, own gate and value.
    *(
        Alias(theirs + "ff.net.0.proj", own + "mlp.fc1", order=swapped)
        for theirs, own in _STACKS.items()
    ),
    Alias("transformer_blocks.{}.adaln_proj.linear", "blocks.{}.adaln_proj.linear"),
)  # fmt: skip
_NORMS = (
    Alias("norm_out.norm", "final_layer.norm"),
    *aliases("", "", same("token_refiner.final_norm")),
    *(alias for theirs, own in _STACKS.items() for alias in aliases(theirs, own, _BLOCK_NORMS)),
)

MINIMAX_H3 = ArchSpec(
    id="minimax_h3",
    title="MiniMax H3",
    detect=has_all("video_patch_proj", "audio_patch_proj", "blocks.0.attn.qkv_proj"),
    blocks=(r"blocks\.\d+", r"token_refiner\.blocks\.\d+"),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    excludes=(r".*adaln.*",),
    base_versions=("minimax_h3", "minimax_h3_ref2va"),
    # Not modulation, 13 of its 33 B numbers: Comfy-Org's own int8 files have it quantised.
    keep=(r"(?!blocks\.\d+\.).*", r".*norm.*"),
    groups={
        "attention": ("*.attn",),
        "mlp": ("*.mlp",),
        "modulation": ("*adaln_proj",),
        "refiner": ("token_refiner",),
    },
)
