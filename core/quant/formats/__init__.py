"""Formats of quantised weights by name."""

from __future__ import annotations

from ...registry import Registry
from .base import MARKER, SCALE, WEIGHT, Format

__all__ = ["FORMATS", "MARKER", "SCALE", "WEIGHT", "Format"]

FORMATS: Registry[Format] = Registry("format of quantised weights")
FORMATS.discover(__name__, __path__, lambda item: item.id if isinstance(item, Format) else None)
