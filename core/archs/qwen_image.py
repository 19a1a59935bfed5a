"""Qwen-Image (with Edit and Layered), and Mage-Flow, which is built like it."""

from __future__ import annotations

from .base import ArchSpec, Condition, aliases, own_names, same

_BLOCK = "transformer_blocks.{}."
_STREAMS = ("img", "txt")
_LAYERS = (
    *aliases("", "", same(
        "img_in", "txt_in", "norm_out.linear", "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
    )),
    *aliases(_BLOCK, _BLOCK, same(
        *(f"attn.to_{x}" for x in ("q", "k", "v", "out.0", "add_out")),
        *(f"attn.add_{x}_proj" for x in "qkv"),
        *(f"{m}_{leaf}" for m in _STREAMS for leaf in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
    )),
)  # fmt: skip
_NORMS = (
    *aliases("", "", same("txt_norm", "time_text_embed.addition_t_embedding")),
    *aliases(_BLOCK + "attn.norm_", _BLOCK + "attn.norm_", same("q", "k", "added_q", "added_k")),
)


def _detect(text: int) -> Condition:
    """``text``: width of the text encoder's output."""
    return lambda shapes: (
        "transformer_blocks.0.img_mlp.net.0.proj" in shapes
        and "transformer_blocks.0.attn.add_q_proj" in shapes
        and tuple(shapes.get("txt_norm", ())) == (text,)
    )


_GROUPS = {
    "attention": ("*.attn",),
    "mlp": ("*_mlp",),
    "modulation": ("*_mod", "norm_out"),
    "image": ("*.img_*", *(f"*.attn.to_{x}" for x in ("q", "k", "v", "out"))),
    "text": ("*.txt_*", "*.attn.add_*", "*.attn.to_add_out"),
}
# Modulation is not in it: it is a third of the weights, which musubi-tuner quantises as well.
_KEEP = (r"(?!transformer_blocks\.\d+\.).*", r".*norm.*")

# musubi-tuner's exclude for modulation, ".*(_mod_).*", matches no dotted name: it is trained.
QWEN_IMAGE = ArchSpec(
    id="qwen_image",
    title="Qwen-Image",
    detect=_detect(3584),
    blocks=(r"transformer_blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    base_versions=("qwen_image", "qwen_image_edit", "qwen_image_layered"),
    modelspec=(
        "Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-Edit-Plus", "Qwen-Image-Edit-2511",
        "Qwen-Image-Layered",
    ),
    keep=_KEEP,
    groups=_GROUPS,
)  # fmt: skip
MAGE_FLOW = ArchSpec(
    id="mage_flow",
    title="Mage-Flow",
    detect=_detect(2560),
    blocks=(r"transformer_blocks\.\d+",),
    layers=own_names(_LAYERS),
    aliases=_LAYERS + _NORMS,
    base_versions=("mageflow", "mageflow_edit"),
    keep=_KEEP,
    groups=_GROUPS,
)
