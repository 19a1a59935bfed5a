"""(IA)^3: a learned factor for every input or output channel of a layer."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import Op, scaled, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .reading import require

WEIGHT, ON_INPUT = "weight", "on_input"


class ChannelScale(Algorithm):
    """dW = s v o W along one axis: W'[o] = (1 + s v[o]) W[o], or of inputs W'[:, i] likewise.

    A grouped convolution has v for the channels of all groups, its weight for those of one, so
    that the rows of group g meet v[g * in / groups :].
    """

    scaled = False
    reads_weight = True

    @property
    @abstractmethod
    def vector(self) -> Tensor:
        """v, (n,) after flattening; 0 leaves a channel as it is."""

    @abstractmethod
    def axis(self, shape: Shape) -> int:
        """0 for output channels, 1 for input channels of a weight of ``shape``."""

    @property
    def rank(self) -> int:
        return 1

    @property
    def alpha(self) -> float:
        return 1.0

    def delta(self, weight: Tensor) -> Tensor:
        return wide(weight, weight) * self._along(weight)

    def merge(self, weight: Tensor) -> Tensor:
        return weight.mul_(self._along(weight).add_(1))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """op(v x, W) for inputs, v op(x, W) for outputs."""
        v = (wide(self.vector, x).flatten() * self.scale).to(x.dtype)
        v = v.reshape(-1, *(1,) * op.dims)
        if self.axis(weight.shape):
            # One for the channels of a group is for all groups.
            v = v.repeat(x.shape[1] // len(v), *(1,) * op.dims) if op.dims else v
            return op(x * v, weight.to(x))
        return (op(x, weight.to(x)) if y is None else y) * v

    def mismatch(self, shape: Shape) -> str | None:
        n, axis = self.vector.numel(), self.axis(shape) if shape else 0
        groups, rest = divmod(n, shape[1]) if axis and len(shape) > 2 else (1, 0)
        fits = axis < len(shape) and not rest and groups > 0 and not shape[0] % groups
        if fits and n == groups * shape[axis]:
            return None
        side = "input" if axis else "output"
        return f"it scales {n} {side} channels, the weight is {tuple(shape)}"

    def _along(self, weight: Tensor) -> Tensor:
        """s v, (out, 1, ..), (1, in, 1, ..) or of groups (out, in / groups, 1, ..)."""
        v = wide(self.vector, weight).flatten() * self.scale
        unit = (1,) * (weight.ndim - 2)
        if not self.axis(weight.shape):
            return v.reshape(-1, *(1,) * (weight.ndim - 1))
        if len(v) == weight.shape[1]:
            return v.reshape(1, -1, *unit)
        rows = v.reshape(-1, weight.shape[1])
        return rows.repeat_interleave(len(weight) // len(rows), 0).reshape(*weight.shape[:2], *unit)


class IA3(ChannelScale):
    """dW = w o W as LyCORIS trains it; biases stay.

    ``weight`` w is (n,) for a linear layer, (1, n, 1, ..) for a convolution, and stands for input
    channels where ``on_input`` is 1. A lone ``weight`` is a full one of some other kind.

    Reference: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
    than In-Context Learning", section 3.3, with 1 + w for l.
    """

    name = "ia3"
    title = "(IA)^3"
    trainable = True
    purpose = "one factor a channel: the fewest numbers of all"
    additive = False
    suffixes = (ON_INPUT, WEIGHT)

    def __init__(self, tensors: Tensors, scale: float = 1.0) -> None:
        super().__init__(tensors, scale)
        self._axis = int(bool(tensors[ON_INPUT].item()))

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        if ON_INPUT not in tensors:
            return None
        require(tensors, WEIGHT)
        factors = cls.own({WEIGHT: tensors[WEIGHT]}, dims=1)
        check_vector(factors, WEIGHT)
        if tensors[ON_INPUT].numel() != 1:
            found = f"a tensor of shape {tuple(tensors[ON_INPUT].shape)}"
            raise AdapterLabError(f"{ON_INPUT} is not 0 or 1", found=found)
        return cls({**factors, ON_INPUT: tensors[ON_INPUT]})

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """w is zero."""
        n = shape[int(config.on_input)]
        size = (1, n, *(1,) * (len(shape) - 2)) if len(shape) > 2 else (n,)
        weight = torch.zeros(size, device=generator.device, dtype=torch.float32)
        return cls({WEIGHT: weight, ON_INPUT: torch.tensor(int(config.on_input))})

    @property
    def vector(self) -> Tensor:
        return self.tensors[WEIGHT]

    @property
    def shape(self) -> tuple[int, ...]:
        """The axis that it knows, the other one 1."""
        n = self.vector.numel()
        return (1, n) if self._axis else (n, 1)

    @property
    def traits(self) -> tuple[str, ...]:
        return ("input channels",) if self._axis else ()

    def axis(self, shape: Shape) -> int:
        return self._axis

    @property
    def reads_output(self) -> bool:
        return not self._axis

    def state(self) -> dict[str, Tensor]:
        return {**self.tensors, WEIGHT: scaled(self.vector, self.scale)}


def check_vector(factors: Tensors, name: str) -> None:
    """Raise AdapterLabError unless the factor has one axis of more than 1 at the most."""
    tensor = factors[name]
    if tensor.numel() != max(tensor.shape):
        found = f"{name} of shape {tuple(tensor.shape)}"
        raise AdapterLabError("An (IA)^3 factor is no vector", found=found)
