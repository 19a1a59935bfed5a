"""Checkpoints of a small training, to be averaged."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

UP, DOWN, ALPHA = "x.lora_up.weight", "x.lora_down.weight", "x.alpha"


def tensors(seed=0, rank=2, dtype=torch.float32, alpha=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {
        UP: torch.randn(6, rank, generator=rng).to(dtype),
        DOWN: torch.randn(rank, 5, generator=rng).to(dtype),
        ALPHA: torch.tensor(alpha),
    }


def put(path, values=None, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if values is None else values, path, metadata or None)
    return path


def three(folder, dtype=torch.float32):
    return [put(folder / f"a-{k:03}.safetensors", tensors(k, dtype=dtype), ss_output_name="a",
                ss_steps=str(k * 10), ss_network_dim="2") for k in (1, 2, 3)]  # fmt: skip
