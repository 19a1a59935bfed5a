"""Where a model file holds what ComfyUI's modules call by other names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from .openclip import openclip

DIFFUSION = "diffusion_model."
_ROOTS = ("model.diffusion_model.", "model.model.", "net.")
_LEAST = 5  # weights below a root, or it is none
_ORIGINAL = "double_blocks.0.img_attn_qkv.weight"
# As ComfyUI renames the weights of HunyuanVideo's own files.
_HUNYUAN = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
    (".q_norm.weight", ".norm.query_norm.weight"),
    (".k_norm.weight", ".norm.key_norm.weight"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)
_SCALE = re.compile(r"(?<=_norm)\.scale$")
_IN_PROJ = re.compile(r"(.+)\.in_proj_(weight|bias)")


class Place(NamedTuple):
    """Part of a tensor of a file.

    Attributes:
        key: of the tensor. shape: of the part.
        rows: (axis, offset, length), None for all of the tensor.
    """

    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int, int] | None = None


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """ComfyUI's name of each weight of a model file -> where it is.

    Args:
        shapes: of the file's tensors by key.

    Reference: ComfyUI 0.30.0, ``comfy/supported_models.py``, ``process_unet_state_dict`` and
    ``process_clip_state_dict``; ``comfy/model_detection.py``, ``unet_prefix_from_state_dict``.
    """
    root = _root(shapes)
    hunyuan = f"{root}{_ORIGINAL}" in shapes
    found: dict[str, Place] = {}
    for key, shape in shapes.items():
        encoder = openclip(key)
        for part, name, (index, count) in encoder:
            length = shape[0] // count if shape else 0
            rows = (0, index * length, length) if count > 1 else None
            size = (length, *shape[1:]) if rows else shape
            found[f"{part}.transformer.{name}"] = Place(key, size, rows)
        if not encoder:
            inside = bool(root) and key.startswith(root)
            name = _renamed(key[len(root) :] if inside else key, hunyuan)
            found |= _split(f"{DIFFUSION}{name}" if inside else name, key, shape)
    return found


def _root(shapes: Mapping[str, object]) -> str:
    """What stands before the names of the diffusion model; "" where nothing does."""
    counts = Counter(next((r for r in _ROOTS if k.startswith(r)), "") for k in shapes)
    counts.pop("", None)
    root, count = counts.most_common(1)[0] if counts else ("", 0)
    if count > _LEAST:
        return root
    return "model." if sum(k.startswith("model.") for k in shapes) > _LEAST else ""


def _renamed(name: str, hunyuan: bool) -> str:
    for theirs, own in _HUNYUAN if hunyuan else ():
        name = name.replace(theirs, own)
    return _SCALE.sub(".weight", name)


def _split(name: str, key: str, shape: tuple[int, ...]) -> dict[str, Place]:
    """q, k and v out of the one weight that Stable Cascade has for them."""
    fused = _IN_PROJ.fullmatch(name)
    if not fused or not name.startswith(DIFFUSION) or not shape or shape[0] % 3:
        return {name: Place(key, shape)}
    length = shape[0] // 3
    return {
        f"{fused[1]}.to_{x}.{fused[2]}": Place(key, (length, *shape[1:]), (0, i * length, length))
        for i, x in enumerate("qkv")
    }
