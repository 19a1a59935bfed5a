"""GLoKr: GLoRA with a Kronecker product in the place of each low-rank matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import Op, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .lokr import LoKr

_A, _B, _LOKR = "glokr_a_", "glokr_b_", "lokr_"
_HALVES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


class GLoKr(Algorithm):
    """dW = s_A W A + s_B B, A = A1 (x) A2 and B = B1 (x) B2; f'(x) = f(x + s_A A x) + s_B B x.

    A is square, (in, in), and acts on the input channels: A1 (i, i') is ``glokr_a_w1``, A2
    (j, j') ``glokr_a_w2``, i j = i' j' = in. B is a LoKr delta of the weight's own shape: B1 (a, b)
    is ``glokr_b_w1``, B2 (c, d, *k) ``glokr_b_w2``. Each of the four may be low-rank, then called
    ``.._a`` and ``.._b``, and B2 may have a Tucker core ``glokr_b_t2``, all as in LoKr. So is the
    scale, for either path by itself: alpha / r if one of its factors is low-rank, else 1. One
    ``alpha`` and one r serve both.

    No other program writes such files: the names and the scale are defined here.

    Reference: Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient
    Fine-tuning", section 3.2, with the factors of Yeh et al. 2023, "Navigating Text-To-Image
    Customization", section 3.
    """

    name = "glokr"
    title = "GLoKr"
    trainable = True
    purpose = "a LoKr of the weight and one of its input"
    folds = tuple(path + name for path in (_A, _B) for name in ("w1", "w1_a"))
    suffixes = (*(_A + h for h in _HALVES), *(_B + h for h in _HALVES), _B + "t2")
    reads_weight = True

    def __init__(self, tensors: Tensors, a: LoKr, b: LoKr) -> None:
        low = next((path for path in (b, a) if not path.full), b)
        super().__init__(tensors, low.scale)
        self._paths, self._low = (a, b), low

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        alpha = {name: tensors[name] for name in ("alpha",) if name in tensors}
        paths = [LoKr.load({**_path(factors, p), **alpha}, scale) for p in (_A, _B)]
        a, b = paths
        if a is None or b is None:
            missing = f"{_A}w1, {_A}w2" if a is None else f"{_B}w1, {_B}w2"
            raise AdapterLabError("A factor is missing", found=", ".join(factors), expected=missing)
        ranks = {path.rank for path in (a, b) if not path.full}
        if len(ranks) > 1:
            raise AdapterLabError("The two paths differ in rank", found=f"{sorted(ranks)}")
        (rows, width, *more), (_, columns, *k) = a.shape, b.shape
        # Two low-rank factors of B2 hide the kernel: d * prod(k).
        if more or rows != width or (columns != width if k else columns % width):
            found = f"A {a.shape}, B {b.shape}"
            raise AdapterLabError("The paths do not fit together", found=found)
        return cls(factors, a, b)

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Both paths as LoKr begins, with a second factor of zero."""
        a = LoKr.init((shape[1], shape[1]), config, generator)
        b = LoKr.init(shape, config, generator)
        return cls({**_named(a.tensors, _A), **_named(b.tensors, _B)}, a, b)

    @property
    def a(self) -> LoKr:
        """A as a LoKr of its own."""
        return self._paths[0].on(_path(self.tensors, _A))

    @property
    def b(self) -> LoKr:
        """B as a LoKr of its own."""
        return self._paths[1].on(_path(self.tensors, _B))

    @property
    def rank(self) -> int:
        return self._low.rank

    @property
    def alpha(self) -> float:
        return self._low.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape

    def mismatch(self, shape: Shape) -> str | None:
        misfit, width = super().mismatch(shape), self.a.shape[1]
        if misfit is None and tuple(shape[1:2]) != (width,):
            return f"it acts on {width} input channels, the weight is {tuple(shape)}"
        return misfit

    def at(self, strength: float) -> Self:
        a, b = self._paths
        return type(self)(self.tensors, a.at(strength), b.at(strength))

    def delta(self, weight: Tensor) -> Tensor:
        rows = wide(weight, weight).movedim(1, -1)
        square = weight.new_empty((weight.shape[1],) * 2, device="meta")
        changed = _transposed(self.a).bypass(rows, Op(), square).movedim(-1, 1)
        return self.b.delta(weight).add_(changed)

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """op(s_A A x, W) + op(x, s_B B)."""
        square = weight.new_empty((weight.shape[1],) * 2, device="meta")
        if op.dims:
            channels = x.reshape(len(x), op.groups, -1, *x.shape[2:]).movedim(2, -1)
            ax = self.a.bypass(channels, Op(), square).movedim(-1, 2).flatten(1, 2)
        else:
            ax = self.a.bypass(x, Op(), square)
        return op(ax, weight.to(x)) + self.b.bypass(x, op, weight)

    def state(self) -> dict[str, Tensor]:
        a, b = self.a.state(), self.b.state()
        return {**_named(a, _A), **_named(b, _B), "alpha": torch.tensor(self.alpha)}


def _path(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors of one path by LoKr's names."""
    start = len(prefix)
    return {_LOKR + n[start:]: t for n, t in tensors.items() if n.startswith(prefix)}


def _named(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The inverse of :func:`_path`."""
    start = len(_LOKR)
    return {prefix + n[start:]: t for n, t in tensors.items() if n.startswith(_LOKR)}


def _transposed(path: LoKr) -> LoKr:
    """A^T = A1^T (x) A2^T, of which W A = (A^T W^T)^T is the bypass."""
    swap = {"a": "b", "b": "a"}
    named = {
        (name[:-1] + swap[name[-1]] if name[-1] in swap else name): t.flatten(1).T
        for name, t in path.tensors.items()
    }
    return path.on(named)
