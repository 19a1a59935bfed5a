"""Stable Diffusion 3 and 3.5 (medium, large): joint blocks with a part each for image and text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import torch

from .base import Alias, ArchSpec, Leaf, Shapes, aliases, has_all, own_names, share, swapped

_BLOCK, _OWN = "transformer_blocks.{}.", "joint_blocks.{}."
_CONTEXT = "norm1_context.linear", "context_block.adaLN_modulation.1"


def _qkv(own: str, *names: str) -> Mapping[str, Leaf]:
    return {name: (own, share(i, 3)) for i, name in enumerate(names)}


_LAYERS = (
    *aliases("", "", {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
    }),
    *aliases("", "", {"norm_out.linear": "final_layer.adaLN_modulation.1"}, order=swapped),
    *aliases(_BLOCK, _OWN, {
        **_qkv("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        **_qkv("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        **_qkv("context_block.attn.qkv",
               "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm1.linear": "x_block.adaLN_modulation.1",
    }),
)  # fmt: skip


def _context_order(rows: int) -> torch.Tensor:
    """Without a model the last block is told by its rows, of medium and of large: scale and shift
    alone, which diffusers swaps. Others have six parts in the same order."""
    return swapped(rows) if rows in _ENDS else torch.arange(rows)


_ENDS = (2 * 1536, 2 * 2432)
_MODULATION = Alias(_BLOCK + _CONTEXT[0], _OWN + _CONTEXT[1], order=_context_order)
_NORMS = (
    *aliases("", "", {"pos_embed.pos_embed": "pos_embed"}),
    *aliases(_BLOCK + "attn", _OWN, {
        f"{n}.norm_{x}": f"x_block.attn{n}.ln_{x}" for n in ("", "2") for x in "qk"
    }),
    *aliases(_BLOCK + "attn.", _OWN, {
        f"norm_added_{x}": f"context_block.attn.ln_{x}" for x in "qk"
    }),
)  # fmt: skip


def _layout(shapes: Shapes) -> tuple[Alias, ...]:
    """The last block ends the text's part: scale and shift alone, which diffusers swaps."""
    end = next(n for n in count() if _OWN.format(n) + "x_block.attn.qkv" not in shapes) - 1
    modulations = tuple(
        Alias(_BLOCK.format(n) + _CONTEXT[0], _OWN.format(n) + _CONTEXT[1],
              order=swapped if n == end else None)
        for n in range(end + 1)
    )  # fmt: skip
    return _LAYERS + modulations + _NORMS


SD3 = ArchSpec(
    id="sd3",
    title="SD3",
    detect=has_all("x_embedder.proj", "joint_blocks.0.x_block.attn.qkv"),
    blocks=(r"joint_blocks\.\d+",),
    layers=own_names((*_LAYERS, _MODULATION)),
    aliases=(*_LAYERS, _MODULATION, *_NORMS),
    excludes=(r".*(adaLN_modulation|ln_q|ln_k).*",),
    hidden="x_embedder.proj",
    layout=_layout,
    base_versions=("medium", "5-medium", "5-large", "sd_3"),
    modelspec=(
        "stable-diffusion-3-medium", "stable-diffusion-3-5-medium", "stable-diffusion-3-5-large",
        "stable-diffusion-3",
        "stable-diffusion-v3-medium",
        "stable-diffusion-v3.5",
    ),
    keep=(
        r"(pos_embed|context_embedder|(x|t|y)_embedder\..+|final_layer\..+)",
        r".*(adaLN_modulation|ln_q|ln_k).*",
    ),
    groups={
        "image": ("*.x_block.*",),
        "text": ("*.context_block.*",),
        "attention": ("*.attn.*", "*.attn2.*"),
        "mlp": ("*.mlp.*",),
        "modulation": ("*.adaLN_modulation.*",),
    },
)  # fmt: skip
