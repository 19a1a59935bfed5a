"""Quantised weights: their formats, and model files that hold them."""

from __future__ import annotations

from .job import Settings
from .report import Layer, Report
from .source import Quantised
from .write import quantize, quantize_file

__all__ = ["Layer", "Quantised", "Report", "Settings", "quantize", "quantize_file"]
