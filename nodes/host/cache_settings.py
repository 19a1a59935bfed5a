"""What the MagCache node was set to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Of one node; None where the model's own settings are meant."""

    ratios: str = "auto"
    manual: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of each branch
    threshold: float | None = None
    k: int | None = None
    retention: float | None = None
    start: float = 0.0
    end: float = 1.0
    calibrate: str = "when missing"
    fill: str = "auto"
    errors: str = "auto"
    guard: float = 0.0
    guard_last: bool = True
    residual: str = "auto"
    node_id: str | None = None
    report: dict[str, Any] | None = field(default=None, compare=False)  # that the node shows
