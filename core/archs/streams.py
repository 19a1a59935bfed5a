"""Tables shared by the transformers of FLUX' kind: blocks with a stream each for image and text,
then blocks with a single one, as diffusers and as ComfyUI call their layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Alias, Family, Leaf, aliases, share

STREAMS = ("img", "txt")


def double(leaves: Mapping[str, Leaf], family: Family = "diffusers") -> tuple[Alias, ...]:
    """Aliases in the blocks of two streams."""
    return aliases("transformer_blocks.{}.", "double_blocks.{}.", leaves, family=family)


def single(leaves: Mapping[str, Leaf], family: Family = "diffusers") -> tuple[Alias, ...]:
    """Aliases in the blocks of one stream."""
    return aliases("single_transformer_blocks.{}.", "single_blocks.{}.", leaves, family=family)


def embedders(theirs: str, own: str) -> tuple[Alias, ...]:
    """A two-layer embedding of a number or a vector."""
    return aliases(theirs, own, {"linear_1": "in_layer", "linear_2": "out_layer"})


ATTENTION = double({
    "attn.to_q": ("img_attn.qkv", share(0, 3)),
    "attn.to_k": ("img_attn.qkv", share(1, 3)),
    "attn.to_v": ("img_attn.qkv", share(2, 3)),
    "attn.add_q_proj": ("txt_attn.qkv", share(0, 3)),
    "attn.add_k_proj": ("txt_attn.qkv", share(1, 3)),
    "attn.add_v_proj": ("txt_attn.qkv", share(2, 3)),
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
})  # fmt: skip
MLP = double({
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
})  # fmt: skip
MODULATION = double({"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"})
DOUBLE = ATTENTION + MODULATION + MLP
LINEAR = single({
    "attn.to_q": ("linear1", 0, 1),
    "attn.to_k": ("linear1", 1, 1),
    "attn.to_v": ("linear1", 2, 1),
    "proj_mlp": ("linear1", 3, None),
    "proj_out": "linear2",
})  # fmt: skip
SINGLE = LINEAR + single({"norm.linear": "modulation.lin"})
# Projections fused again: diffusers' fuse_qkv_projections, then OneTrainer's.
FUSED = double({
    "attn.to_qkv": "img_attn.qkv",
    "attn.to_added_qkv": "txt_attn.qkv",
    "attn.qkv": "img_attn.qkv",
    "attn.added_qkv": "txt_attn.qkv",
}, "other") + single({"attn.to_qkv": ("linear1", 0, 3), "qkv_mlp": "linear1"}, "other")  # fmt: skip

DOUBLE_NORMS = double({
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
})  # fmt: skip
NORMS = DOUBLE_NORMS + single({
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
})  # fmt: skip

BLOCKS = (r"double_blocks\.\d+", r"single_blocks\.\d+")
# Layers of the single blocks that hold both attention and MLP are in neither of these groups.
GROUPS = {
    "double": ("double_blocks.*",),
    "single": ("single_blocks.*",),
    "image": ("double_blocks.*.img_*",),
    "text": ("double_blocks.*.txt_*",),
    "attention": ("double_blocks.*.???_attn.*",),
    "mlp": ("double_blocks.*.???_mlp.*",),
    "modulation": ("double_blocks.*.???_mod.*", "single_blocks.*.modulation.*"),
}
