"""Adapters of a layer that has more inputs than the model's own."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import Op
from .base import Algorithm, Shape, Tensors
from .wrapper import Wrapper

# Around everything else, for it makes the weight that the rest is made for.
ORDER = 1

RESHAPE = "reshape_weight"


class Padded(Wrapper):
    """W' = pad(W) + dW: W with zeros after its rows and columns up to the shape ``reshape_weight``.

    FLUX.1 control files enlarge ``img_in`` so, from 64 inputs to 128. Merging gives a weight of
    that shape, not of W's; a delta has it as well.
    """

    suffixes = (RESHAPE,)

    def __init__(self, inner: Algorithm, tensors: Tensors, sizes: tuple[int, ...]) -> None:
        super().__init__(inner, tensors)
        self.sizes = sizes

    @classmethod
    def wrap(cls, inner: Algorithm, tensors: Tensors) -> Self:
        given = tensors[RESHAPE]
        if given.ndim != 1 or given.is_floating_point() or given.is_complex():
            dtype = str(given.dtype).removeprefix("torch.")
            found = f"{dtype} of shape {tuple(given.shape)}"
            raise AdapterLabError(f"{RESHAPE} is not a shape", found=found)
        sizes = tuple(int(n) for n in given)
        misfit = inner.misfit(sizes) if sizes else "it has no axes"
        if misfit:
            raise AdapterLabError(f"{RESHAPE} is not the shape of the delta", found=misfit)
        return cls(inner, {RESHAPE: given}, sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def whole(self) -> str:
        return "it makes the weight larger"

    @property
    def traits(self) -> tuple[str, ...]:
        return (*self.inner.traits, f"enlarges the weight to {self.sizes}")

    def mismatch(self, shape: Shape) -> str | None:
        mine, given = self.sizes, tuple(shape)
        if len(mine) == len(given) and all(n <= m for n, m in zip(given, mine, strict=True)):
            return None
        return f"it makes the weight {mine}, the weight is {given}"

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(self._padded(weight))

    def merge(self, weight: Tensor) -> Tensor:
        """pad(W) + dW, in the place of W only where that has the shape already."""
        return self.inner.merge(self._padded(weight))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        if weight.shape != self.sizes:
            raise AdapterLabError(
                "An adapter that enlarges a weight cannot act beside it",
                found=f"a weight of {tuple(weight.shape)}",
                expected=str(self.sizes),
                fix="Merge it",
            )
        return self.inner.bypass(x, op, weight, y)

    def settled(self, weight: Tensor) -> Self:
        return self._around(self.inner.settled(self._padded(weight)))

    def _padded(self, weight: Tensor) -> Tensor:
        if weight.shape == self.sizes:
            return weight
        padded = weight.new_zeros(self.sizes)
        padded[tuple(slice(n) for n in weight.shape)] = weight
        return padded
