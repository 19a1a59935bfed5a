"""JoyImage Edit: diffusers calls every layer as ComfyUI does."""

from __future__ import annotations

from .base import ArchSpec, aliases, has_all, own_names, same

_BLOCK = "double_blocks.{}."
_STREAMS = ("img", "txt")
_LAYERS = aliases("", "", same(
    "img_in", "proj_out", "condition_embedder.time_proj",
    *(f"condition_embedder.{m}_embedder.linear_{i}" for m in ("time", "text") for i in (1, 2)),
    *(f"{_BLOCK}attn.{m}_attn_{leaf}" for m in _STREAMS for leaf in ("qkv", "proj")),
    *(f"{_BLOCK}{m}_mlp.{leaf}" for m in _STREAMS for leaf in ("net.0.proj", "net.2")),
))  # fmt: skip
_NORMS = aliases(_BLOCK, _BLOCK, same(
    *(f"attn.{m}_attn_{x}_norm" for m in _STREAMS for x in "qk"),
    *(f"{m}_mod.modulate_table" for m in _STREAMS),
))  # fmt: skip

JOYIMAGE = ArchSpec(
    id="joyimage",
    title="JoyImage",
    detect=has_all("double_blocks.0.attn.img_attn_qkv", "condition_embedder.time_proj"),
    blocks=(r"double_blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    keep=(r"(?!double_blocks\.\d+\.).*", r".*(norm|_mod\.).*"),
    groups={
        "attention": ("*.attn",),
        "mlp": ("*_mlp",),
        "modulation": ("*_mod", "condition_embedder.time_proj"),
        "image": ("*.img_*",),
        "text": ("*.txt_*",),
    },
)
