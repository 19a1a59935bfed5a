"""What a training run is, as plain numbers. Everything validates itself when it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import AdapterLabError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its settings.

    Args:
        learning_rate: peak learning rate, reached after ``warmup`` steps.
        weight_decay: decoupled weight decay.
        clip: largest norm of the gradient of all factors together, 0 for none.
        warmup: steps of linear warm-up.
    """

    optimizer: str = "AdamW"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AdapterLabError(
                "The learning rate is unusable",
                found=str(self.learning_rate),
                expected="a positive number, 1e-4 for most adapters",
            )

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (counted from 0)."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what to keep.

    Args:
        steps: optimiser steps in all, resumed ones included.
        batch_size: items of one forward pass.
        accumulation: forward passes of one optimiser step.
        seed: fixes initial factors, order, noise and timesteps; 0 to 2^64 - 1.
        save_every: steps between two adapter files, 0 for the last only.
        keep_last: how many adapter files to keep, 0 for all.
    """

    steps: int = 500
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    save_every: int = 100
    keep_last: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "save_every": 0, "keep_last": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise AdapterLabError(
                    f"'{name}' is too small",
                    found=str(getattr(self, name)),
                    expected=f"{bound} or more",
                )

    def saves_at(self, step: int) -> bool:
        """Whether an adapter file is written after ``step`` completed steps."""
        due = self.save_every > 0 and step % self.save_every == 0
        return due or step == self.steps
