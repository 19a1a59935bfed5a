"""Algorithms around another algorithm: what can be done to any delta, written once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor
from typing_extensions import Self

from .base import Algorithm, Shape, Tensors


class Wrapper(Algorithm):
    """``inner`` with something done to its delta.

    ``suffixes`` are the tensors that call for the wrapper; one without is put on by code.
    """

    suffixes = ()

    def __init__(self, inner: Algorithm, tensors: Tensors = {}) -> None:  # noqa: B006
        super().__init__({**inner.tensors, **tensors}, inner.scale)
        self.inner = inner
        self.own_names = tuple(tensors)
        # Looked up on instances as well, where a wrapper is what it wraps.
        described: Any = self
        described.name, described.title = inner.name, inner.title

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
