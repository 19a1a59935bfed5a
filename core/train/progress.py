"""Where a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Everything a resumed run needs besides factors, optimizer and averages.

    Attributes:
        step: completed optimiser steps.
        losses: training loss of each completed step.
        validation: (step, held-out loss).
        scale: the loss is multiplied by it for the backward pass (Micikevicius et al. 2018,
            "Mixed Precision Training", section 3.2), halved when gradients overflow; 0 before the
            first step.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list[float])
    validation: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    scale: float = 0.0

    @classmethod
    def restored(cls, table: Mapping[str, Any]) -> Progress:
        """From what JSON makes of its attributes."""
        validation = [(int(step), float(loss)) for step, loss in table["validation"]]
        losses = [float(loss) for loss in table["losses"]]
        return cls(int(table["step"]), losses, validation, float(table["scale"]))
