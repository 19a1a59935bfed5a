"""OpenCLIP's names of a text encoder's weights, as checkpoints of SD2 and SDXL hold them."""

from __future__ import annotations

import re
from typing import NamedTuple

_ROOT = re.compile(
    r"(?:(?P<clip_g>conditioner\.embedders\.[01])|(?P<clip_h>cond_stage_model))\.model\."
)
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LEAVES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_FUSED = {"attn.in_proj_weight": "weight", "attn.in_proj_bias": "bias"}
_ALONE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


class Named(NamedTuple):
    """A parameter in ComfyUI's names, and where it lies in the stored tensor.

    Attributes:
        rows: (index, count): it is the index-th of so many equal ranges of rows.
    """

    part: str
    name: str
    rows: tuple[int, int] = (0, 1)


def openclip(key: str) -> list[Named]:
    """What the tensor ``key`` of a checkpoint is for ComfyUI; q, k and v of one fused weight.

    [] for all that is no OpenCLIP weight, and for its projection, which is stored transposed.
    """
    root = _ROOT.match(key)
    if root is None or root.lastgroup is None:
        return []
    part, name = root.lastgroup, key[root.end() :]
    block = _BLOCK.fullmatch(name)
    if block is None:
        return [Named(part, _ALONE[name])] if name in _ALONE else []
    head, leaf = f"text_model.encoder.layers.{block[1]}.", block[2]
    if leaf in _FUSED:
        end = _FUSED[leaf]
        names = (f"{head}self_attn.{x}_proj.{end}" for x in "qkv")
        return [Named(part, each, (i, 3)) for i, each in enumerate(names)]
    module, _, end = leaf.rpartition(".")
    return [Named(part, f"{head}{_LEAVES[module]}.{end}")] if module in _LEAVES else []
