"""Random but plausible training data for the tiny models."""

from __future__ import annotations

from typing import Any

import torch
from adapter_lab.core.train.data import TrainDataset, TrainItem

SHAPES = {"flux": (16, 8, 8), "wan": (16, 1, 8, 8), "sd15": (4, 8, 8)}
TEXT = {"flux": (4, 64), "wan": (6, 4096), "sd15": (77, 768)}


def items(kind: str, count: int = 4, seed: int = 0) -> list[TrainItem]:
    """``count`` items with a conditioning of their own each."""
    rng = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    made = []
    for i in range(count):
        if kind == "flux":
            extra = {"pooled_output": torch.randn(32, generator=rng)}
        latent, text = (torch.randn(s, generator=rng) for s in (SHAPES[kind], TEXT[kind]))
        made.append(TrainItem(latent, text, extra, caption=f"item {i}"))
    return made


def dataset(kind: str, count: int = 4, seed: int = 0) -> TrainDataset:
    """The same as a dataset."""
    return TrainDataset(items(kind, count, seed))
