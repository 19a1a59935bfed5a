"""Quantised weights of files read back as numbers."""

from __future__ import annotations

from .weights import (
    METADATA,
    Stored,
    dequantised,
    helpers,
    is_quantised,
    read_weight,
    runs,
    stored,
)

__all__ = [
    "METADATA", "Stored", "dequantised", "helpers", "is_quantised", "read_weight", "runs", "stored",
]  # fmt: skip
