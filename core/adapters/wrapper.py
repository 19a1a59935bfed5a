"""Algorithms around another algorithm: what can be done to any delta, written once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor
from typing_extensions import Self

from ..forms import Layer, Mode
from ..tensors import Op
from .base import Algorithm, Shape, Tensors
from .draw import Draw


class Wrapper(Algorithm):
    """``inner`` with something done to its delta.

    ``suffixes`` are the tensors that call for the wrapper; one without is put on by code.
    """

    suffixes = ()

    def __init__(self, inner: Algorithm, tensors: Tensors | None = None) -> None:
        tensors = tensors or {}
        super().__init__({**inner.tensors, **tensors}, inner.scale)
        self.inner = inner
        self.own_names = tuple(tensors)
        # Looked up on instances as well, where a wrapper is what it wraps.
        described: Any = self
        described.name, described.title = inner.name, inner.title
        described.trainable, described.up, described.folds = inner.trainable, inner.up, inner.folds
        self.precise = inner.precise

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        return None

    @classmethod
    def wrap(cls, inner: Algorithm, tensors: Tensors) -> Algorithm:
        """``inner`` with what ``tensors`` ask for; raises AdapterLabError where they can't."""
        raise NotImplementedError(f"no tensor of a file asks for {cls.__name__}")

    @property
    def reads_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.reads_weight

    @property
    def reads_output(self) -> bool:
        return self.inner.reads_output

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def alpha(self) -> float:
        return self.inner.alpha

    @property
    def bias(self) -> Algorithm | None:
        return self.inner.bias

    @property
    def trained(self) -> dict[str, Tensor]:
        names = {*self.inner.trained, *self.own_names}
        return {name: t for name, t in self.tensors.items() if name in names}

    @property
    def needs_weight_to_start(self) -> bool:
        return self.inner.needs_weight_to_start

    def started(self, weight: Tensor) -> Algorithm:
        return self._around(self.inner.started(weight))

    @property
    def draws(self) -> bool:
        return self.inner.draws

    def drawn(self, draw: Draw) -> Algorithm | None:
        inner = self.inner.drawn(draw)
        return None if inner is None else self._around(inner)

    @property
    def by_item(self) -> bool:
        return self.inner.by_item

    @property
    def whole(self) -> str:
        return self.inner.whole

    @property
    def traits(self) -> tuple[str, ...]:
        return self.inner.traits

    def mismatch(self, shape: Shape) -> str | None:
        return self.inner.mismatch(shape)

    def configured(self, config: Mapping[str, Any]) -> Self:
        inner = self.inner.configured(config)
        return self if inner is self.inner else self._around(inner)

    def at(self, strength: float) -> Self:
        return self._around(self.inner.at(strength))

    def on(self, tensors: Tensors) -> Self:
        inner = self.inner.on({name: tensors[name] for name in self.inner.tensors})
        moved = self._around(inner)
        moved.tensors = dict(tensors)
        return moved

    def state(self) -> dict[str, Tensor]:
        return {**self.inner.state(), **self._own}

    @property
    def _own(self) -> dict[str, Tensor]:
        """The tensors that are not of ``inner``."""
        return {name: self.tensors[name] for name in self.own_names}

    def _around(self, inner: Algorithm) -> Self:
        other = copy(self)
        other.inner = inner
        other.scale = inner.scale
        other.tensors = {**inner.tensors, **self._own}
        return other


class Acting(Wrapper):
    """A wrapper that acts on the weight as another algorithm does, as ``inner`` if no other."""

    @property
    def acting(self) -> Algorithm:
        """That algorithm."""
        return self.inner

    def delta(self, weight: Tensor) -> Tensor:
        return self.acting.delta(weight)

    def merge(self, weight: Tensor) -> Tensor:
        return self.acting.merge(weight)

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        return self.acting.bypass(x, op, weight, y)

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        return self.acting.adapted(layer, x, mode)
