"""Seeded model and adapter files of a toy FLUX.1 for the file tools."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 64
LAYERS = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "double_blocks.0.img_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.0.img_mlp.2": (WIDTH, 4 * WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
}
OTHERS = {
    "img_in": (WIDTH, WIDTH),
    "vector_in.in_layer": (WIDTH, 32),
    "double_blocks.0.img_mod.lin": (6 * WIDTH, WIDTH),
}
METADATA = {"ss_base_model_version": "flux1", "ss_output_name": "toy"}


def model(path: Path, seed: int = 0, *, like: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Random float32 weights; with ``like``, these changed by rank 2 in the layers of blocks."""
    rng = torch.Generator().manual_seed(seed)
    shapes = LAYERS | OTHERS
    made = {f"{n}.weight": torch.randn(s, generator=rng) * 0.02 for n, s in shapes.items()}
    made |= {f"{n}.bias": torch.randn(s[0], generator=rng) for n, s in shapes.items()}
    if like is not None:
        made = dict(like)
        for name, (out, width) in LAYERS.items():
            up = torch.randn(out, 2, generator=rng)
            down = torch.randn(2, width, generator=rng)
            made[f"{name}.weight"] = like[f"{name}.weight"] + 0.01 * up @ down
    save_file(made, path)
    return made


def lora(path: Path, seed: int, rank: int = 4, step: int = 0, **more: str) -> dict[str, Tensor]:
    """A LoRA of every layer of the blocks in ComfyUI's spelling; ``more``: metadata."""
    rng = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, (out, width) in LAYERS.items():
        stem = f"diffusion_model.{name}"
        made[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=rng)
        made[f"{stem}.lora_down.weight"] = torch.randn(rank, width, generator=rng)
        made[f"{stem}.alpha"] = torch.tensor(2.0)
    steps = {"ss_steps": str(step)} if step else {}
    save_file(made, path, METADATA | steps | more)
    return made
