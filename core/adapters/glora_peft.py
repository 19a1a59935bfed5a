"""GLoRA as peft writes it: five paths, each low-rank, a vector, a number or nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import scaled, wide
from .base import Algorithm, Shape, Tensors
from .reading import check_product, require
from .wrapper import Wrapper

# What a path is made of: Xd Xu, one X, or the zeros that peft keeps for a path that is off.
_KINDS = {"Xd": ("Xd", "Xu"), "Xu": ("Xd", "Xu"), "X": ("X",), "zeros": ("zeros",)}


class PeftGLoRA(Algorithm):
    """dW = W o A + B and db = b o D + E + W C, unscaled; o is elementwise.

    A and B are ``glora_A.Xd`` (out, r) ``glora_A.Xu`` (r, in), a column ``glora_A.X`` (out, 1) or
    a number (1,); D and E are ``X``, (out,) or (1,); C is ``Xd`` (in, r) ``Xu`` (r, 1) or ``X``
    (in, 1). A path that is off has ``zeros`` or no tensor. For C a bias has to be settled beside
    its weight first.

    Reference: Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient
    Fine-tuning", section 3.2, equation 10, with an elementwise product for that with A.
    """

    name = "glora_peft"
    title = "GLoRA (peft)"
    untrained = "GLoRA trains the low-rank terms of it"
    suffixes = tuple(f"glora_{path}.{kind}" for path in "ABCDE" for kind in _KINDS)
    scaled = False
    reads_weight = True

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=1)
        if not factors:
            return None
        for path in "ABCDE":
            _check(factors, path)
        sizes = [size for path in "AB" for size in [_size(factors, path)] if size]
        if not sizes:
            raise AdapterLabError("A factor is missing", found=", ".join(factors), expected="A, B")
        known = [{size[axis] for size in sizes} - {0} for axis in (0, 1)]
        if any(len(lengths) > 1 for lengths in known):
            found = " and ".join(map(str, sizes))
            raise AdapterLabError("A and B differ in shape", found=found)
        return cls(factors)

    @property
    def rank(self) -> int:
        return max((len(t) for name, t in self.tensors.items() if name.endswith("Xu")), default=1)

    @property
    def alpha(self) -> float:
        return float(self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), where A and B leave one open 1."""
        sizes = [_size(self.tensors, path) or (0, 0) for path in "AB"]
        return tuple(max(1, *lengths) for lengths in zip(*sizes, strict=True))

    @property
    def bias(self) -> Algorithm | None:
        on = {name: self.tensors[name] for path in "CDE" for name in self._of(path)}
        # Of a file whose values are not read yet, what may be.
        changed = any(t.is_meta or t.any() for t in on.values())
        return BiasPaths(PeftGLoRA(on, self.scale)) if changed else None

    def mismatch(self, shape: Shape) -> str | None:
        found = f"the weight is {tuple(shape)}"
        if len(shape) < 2:
            return f"its delta is {self.shape}, {found}"
        channels = max((len(self.tensors[name]) for name in self._of("C")[:1]), default=1)
        if channels not in (1, shape[1]):
            return f"its path to the bias is from {channels} input channels, {found}"
        sizes = [_size(self.tensors, path) or (0, 0) for path in "AB"]
        given = (*shape[:2], math.prod(shape[2:]))
        if any(n not in (0, m) for size in sizes for n, m in zip((*size, 1), given, strict=True)):
            return f"its delta is {self.shape}, {found}"
        return None

    def delta(self, weight: Tensor) -> Tensor:
        dense = wide(weight, weight) * self._along("A", weight)
        return dense.add_(self._along("B", weight))

    def merge(self, weight: Tensor) -> Tensor:
        """One dense matrix at a time."""
        weight.addcmul_(weight, self._along("A", weight))
        return weight.add_(self._along("B", weight))

    def bias_delta(self, bias: Tensor) -> Tensor:
        """s (b o D + E), (out,), float32."""
        return (wide(bias, bias) * self._path("D", bias) + self._path("E", bias)) * self.scale

    def beside(self, weight: Tensor) -> PeftGLoRA:
        """The same with C gone and W C, (out,), added to E."""
        w, c = wide(weight, weight).reshape(weight.shape[:2]), self._path("C", weight)
        added = self._path("E", weight) + (w @ c.expand(w.shape[1], 1)).flatten()
        gone = {*self._of("C"), *self._of("E")}
        kept = {name: t for name, t in self.tensors.items() if name not in gone}
        return PeftGLoRA({**kept, "glora_E.X": added}, self.scale)

    def state(self) -> dict[str, Tensor]:
        if self.scale == 1:
            return dict(self.tensors)
        once = ("Xd", "X")
        return {
            name: scaled(t, self.scale) if name.endswith(once) else t
            for name, t in self.tensors.items()
        }

    def _along(self, path: str, weight: Tensor) -> Tensor:
        """s times path A or B, in a shape that broadcasts with ``weight``."""
        given = self._path(path, weight) * self.scale
        return given if given.ndim < 2 else given.reshape(*given.shape, *(1,) * (weight.ndim - 2))

    def _path(self, path: str, like: Tensor) -> Tensor:
        """What the path stands for, wide, in a shape that broadcasts."""
        factors = [wide(self.tensors[name], like) for name in self._of(path)]
        if not factors:
            return torch.zeros((), device=like.device)
        return factors[0] if len(factors) == 1 else factors[0] @ factors[1]

    def _of(self, path: str) -> list[str]:
        """Names of its factors; none of a path that is off."""
        names = (f"glora_{path}.{kind}" for kind in _KINDS if kind != "zeros")
        return [name for name in names if name in self.tensors]


class BiasPaths(Wrapper):
    """D and E of ``inner``, on the bias, (out,); with C once it is settled beside its weight."""

    @property
    def reads_output(self) -> bool:
        return not any(name.startswith("glora_C") for name in self.tensors)

    def settled(self, weight: Tensor) -> BiasPaths:
        assert isinstance(self.inner, PeftGLoRA)
        return BiasPaths(self.inner.beside(weight))

    def delta(self, weight: Tensor) -> Tensor:
        assert isinstance(self.inner, PeftGLoRA)
        return self.inner.bias_delta(weight)

    def mismatch(self, shape: Shape) -> str | None:
        longest = max((len(t) for name, t in self.tensors.items() if name[6] in "DE"), default=1)
        fits = len(shape) == 1 and longest in (1, shape[0])
        return None if fits else f"its bias is ({longest},), the layer's is {tuple(shape)}"


def _check(factors: Tensors, path: str) -> None:
    """Raise AdapterLabError unless a path is given once and in one of its shapes."""
    given = [kind for kind in _KINDS if f"glora_{path}.{kind}" in factors]
    if not given:
        return
    names = [f"glora_{path}.{kind}" for kind in _KINDS[given[0]]]
    require(factors, *names)
    if len(given) > len(names):
        found = ", ".join(f"glora_{path}.{kind}" for kind in given)
        raise AdapterLabError(f"Path {path} of GLoRA is given twice", found=found)
    first, last = factors[names[0]], factors[names[-1]]
    fits = {
        "Xd": first.ndim == last.ndim == 2 and first.shape[1] == len(last),
        "X": tuple(first.shape[1:]) == (1,) or tuple(first.shape) == (1,),
        "zeros": first.ndim == 2 or path not in "AB",
    }[given[0]]
    if path in "DE":
        fits = given[0] != "Xd" and first.ndim == 1
    check_product(fits and (path != "C" or last.shape[-1] == 1), factors, *names)


def _size(factors: Tensors, path: str) -> tuple[int, int] | None:
    """(out, in) of path A or B, 0 for an axis that it leaves open; None without tensors."""
    for kind, names in _KINDS.items():
        tensors = [factors[n] for name in names if (n := f"glora_{path}.{name}") in factors]
        if kind == "X" and tensors:
            return (len(tensors[0]) if tensors[0].ndim > 1 else 0, 0)
        if tensors:
            return (len(tensors[0]), tensors[-1].shape[1])
    return None
