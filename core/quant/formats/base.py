"""What a format of quantised weights is, and how ComfyUI marks a layer that has one."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

WEIGHT, SCALE, WHOLE, MARKER = "weight", "weight_scale", "weight_scale_2", "comfy_quant"
TINY = torch.finfo(torch.float32).tiny
Info = tuple[torch.dtype, tuple[int, ...]]
Codes = NDArray[Any]
Scales = Mapping[str, Tensor]


class Piece(NamedTuple):
    """Rows of a weight, quantised.

    Attributes:
        parts: tensors of these rows, by their name below the layer's path.
        missed: (rows, in) float32, what they stand for less what they were.
    """

    parts: dict[str, Tensor]
    missed: Tensor


class Format(ABC):
    """One format.

    Attributes:
        id: registry name. title: as users write it. about: what it takes and what it loses.
        native: ComfyUI's name for it.
        multiple: what rows and columns of a weight have to be multiples of.
        compute: the hardware that is fast at multiplying in it, for users.
        dequantises: whether ComfyUI multiplies in the model's precision instead, on other hardware
            and where a mark asks for it; if not, in the format on any.
        end, normal: codes of the largest size and of the smallest that has all digits.
    """

    id: str
    title: str
    about: str
    native: str
    multiple: tuple[int, int]
    compute: str
    dequantises: bool = True
    end: int
    normal: int

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a linear layer's weight (out, in) can have this format."""
        pairs = zip(shape, self.multiple, strict=False)
        return len(shape) == 2 and all(size and size % m == 0 for size, m in pairs)

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, Info]:
        """dtype and shape of what a weight (out, in) becomes, by name below the layer's path."""

    def scales(self, peak: float) -> dict[str, Tensor]:
        """Float32 scales of a whole weight whose largest number has the size ``peak``."""
        return {}

    def turned(self, exact: Tensor) -> Tensor:
        """What of some rows (rows, in) is rounded: they, in an orthogonal basis."""
        return exact

    @abstractmethod
    def code(self, exact: Tensor, scales: Scales) -> Piece:
        """Quantise some rows (rows, in), turned, float32 and finite; they stay as they are."""

    @abstractmethod
    def sizes(self, stored: Tensor) -> tuple[Codes, ...]:
        """Codes without their signs of some rows of a stored weight."""

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of all rows in the order in which files have it."""
        return tensor

    def options(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What the mark of a layer says beside the format."""
        return {}

    def multiplied(self, *, full_precision: bool) -> str:
        """What ComfyUI multiplies in, for users."""
        if not self.dequantises:
            return f"in this format on any hardware, fast on {self.compute}"
        if full_precision:
            return "in the model's precision on any hardware"
        return f"in this format on {self.compute}; elsewhere in the model's precision"

    def marker(self, shape: tuple[int, ...], *, full_precision: bool = False) -> Tensor:
        """What ComfyUI knows a layer's format by: JSON as bytes.

        Reference: ComfyUI 0.30.0, ``comfy/ops.py``, ``_quantized_weight_state_dict``.
        """
        more = {"full_precision_matrix_mult": True} if full_precision else {}
        said = json.dumps({"format": self.native, **more, **self.options(shape)})
        return torch.tensor(list(said.encode()), dtype=torch.uint8)
