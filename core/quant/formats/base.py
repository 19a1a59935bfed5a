"""What a format of quantised weights is, and how ComfyUI marks a layer that has one."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT, SCALE, MARKER = "weight", "weight_scale", "comfy_quant"  # names below a layer's path
Info = tuple[torch.dtype, tuple[int, ...]]


class Encoded(NamedTuple):
    """A quantised weight.

    Attributes:
        tensors: by their name below the layer's path. error: ||W' - W|| / ||W||.
    """

    tensors: dict[str, Tensor]
    error: float


class Format(ABC):
    """One format.

    Attributes:
        id: registry name. title: as users write it. native: ComfyUI's name for it.
    """

    id: str
    title: str
    native: str

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a linear layer's weight (out, in) can have this format."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        """dtype and shape of what :meth:`encode` makes of a weight (out, in)."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Encoded:
        """Quantise a finite weight (out, in) of any float dtype."""

    def marker(self) -> Tensor:
        """What ComfyUI knows a layer's format by: JSON as bytes.

        Reference: ComfyUI 0.30.0, ``comfy/ops.py``, ``_quantized_weight_state_dict``.
        """
        return torch.tensor(list(json.dumps({"format": self.native}).encode()), dtype=torch.uint8)
