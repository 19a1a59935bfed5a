"""Quantised weights: their formats, and model files that hold them."""

from __future__ import annotations

from .write import quantize_file

__all__ = ["quantize_file"]
