"""Deltas of linear layers as few tensors: forward and backward passes that keep no dense matrix."""

from .base import Form
from .dense import Dense
from .hadamard import Hadamard
from .kronecker import Kronecker, NarrowKronecker
from .layer import Layer, Mode
from .recompute import recomputed
from .thin import Thin
from .turn import turned

__all__ = [
    "Dense", "Form", "Hadamard", "Kronecker", "Layer", "Mode", "NarrowKronecker", "Thin",
    "recomputed", "turned",
]  # fmt: skip
