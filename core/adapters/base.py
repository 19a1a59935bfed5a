"""The contract every algorithm obeys.

    W'(m) = W + dW(m)        m: the user's strength; m * dW for all that is additive

Weights are ``(out, in, *k)``, of a grouped convolution ``(out, in / groups, *k)``. Factors may be
stored in any dtype; a delta is computed in float32, in float64 for a weight in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import Op

Tensors = Mapping[str, Tensor]
Shape = Sequence[int]


@dataclass(frozen=True)
class AdapterConfig:
    """What to train. Options an algorithm does not know are ignored by it.

    Args:
        algorithm: name in the registry of algorithms.
        rank: r, at least 1.
        alpha: scale is alpha / rank; 0 means alpha = rank.
        factor: LoKr's factor, -1 for the most balanced factorisation.
        decompose_both: LoKr: low-rank first factor as well.
        full_matrix: LoKr: no low-rank factors at all.
        tucker: Tucker decomposition of k x k convolutions.
    """

    algorithm: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    tucker: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterLabError("No such rank", found=str(self.rank), expected="1 or more")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha or self.rank) / self.rank


class Algorithm(ABC):
    """One adapter on one weight: its factors by suffix, and their scale.

    Attributes:
        name: registry name. title: as users write it.
        suffixes: tensor names it owns, in the spelling of LyCORIS/kohya ("lora_up.weight").
            ``alpha`` belongs to every algorithm and is not listed. ``*`` stands for one name.
        parameter: what of a layer it changes, "weight" or "bias".
        trainable: whether it can be chosen for training.
        scaled: whether its scale is alpha / rank; where not, alpha means something else or nothing.
        reads_weight: whether the delta depends on the values of W and not only on its shape.
        tensors: suffix -> factor, without alpha.
        scale: s in dW = s * (...), alpha / r unless the algorithm says otherwise.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    parameter: ClassVar[str] = "weight"
    trainable: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False

    def __init__(self, tensors: Tensors, scale: float = 1.0) -> None:
        self.tensors = dict(tensors)
        self.scale = scale

    @classmethod
    @abstractmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        """Recognise the tensors of one module, None when they are not of this algorithm.

        Args:
            tensors: suffix -> tensor of one stem, ``alpha`` included where the file has it.
            scale: set when something outside the file fixes the scale (peft's config); it then
                wins over alpha, whatever the algorithm's own rule for alpha is.

        Raises:
            AdapterLabError: they are of this algorithm but broken (rank 0, factors that do not
                multiply, alpha with several values, a factor missing).
        """

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Fresh float32 factors for a weight of ``shape``; the delta is exactly zero."""
        raise AdapterLabError(f"{cls.title} is read, not trained")

    @property
    @abstractmethod
    def rank(self) -> int:
        """r, the number that alpha is divided by; of an algorithm without ranks its block size."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in, *k), or (out, in * prod(k)) where the factors hide k."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """dW in the shape and on the device of ``weight``; float64 if it is, else float32."""

    def merge(self, weight: Tensor) -> Tensor:
        """W + dW in the place of ``weight``, float32 or float64, which is returned.

        Overridden where it saves a dense dW.
        """
        return weight.add_(self.delta(weight))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """h(x) with f(x) + h(x) = op(x, W + dW); overridden where no dense dW is needed.

        Args:
            x: input of the layer, ``(..., in)`` or ``(b, in, *spatial)``.
            op: the layer without its weight.
            weight: W, (out, in, *k); unless ``reads_weight`` only its shape means anything.
            y: op(x, W), the layer's output without its bias, where it is known already.
        """
        return op(x, self.delta(weight).to(x))

    def configured(self, config: Mapping[str, Any]) -> Algorithm:
        """The algorithm under what peft's adapter_config.json says beyond alpha and r.

        Raises:
            AdapterLabError: a setting of the wrong type or out of range.
        """
        return self

    def at(self, strength: float) -> Self:
        """The algorithm whose delta is dW(m) of this one; here m * dW, by its scale."""
        scaled = copy(self)
        scaled.scale = self.scale * strength
        return scaled

    def on(self, tensors: Tensors) -> Self:
        """The same algorithm and scale with other factors, of the names that its own have.

        They may have moved, or be parts of them; what was worked out from the old ones is not kept.
        """
        moved = copy(self)
        moved.tensors = dict(tensors)
        return moved

    def settled(self, weight: Tensor) -> Algorithm:
        """The same for the layer that has this weight, ready for use again and again.

        What takes only the weight and the factors to know is worked out: a decomposition, finished
        rotations, lengths. What acts on a bias but depends on the weight beside it learns it here.
        Its factors may have other names then.
        """
        return self

    @property
    def bias(self) -> Algorithm | None:
        """What it does to the layer's bias, None for nothing."""
        return None

    @property
    def reads_output(self) -> bool:
        """Whether a bypass of an ungrouped layer needs no values of W once it is given y."""
        return not self.reads_weight

    @property
    def whole(self) -> str:
        """Why it needs all rows of a weight and can't act on a range; "" where it can."""
        return ""

    @property
    def traits(self) -> tuple[str, ...]:
        """What a report adds to the title ("DoRA", "Tucker")."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """Suffix -> tensor as a file holds it, ``alpha`` included."""
        return {**self.tensors, "alpha": torch.tensor(self.alpha)}

    @property
    def alpha(self) -> float:
        """What a file stores so that alpha / rank gives the scale back."""
        return self.scale * self.rank

    def misfit(self, shape: Shape) -> str | None:
        """Why the delta cannot be added to a weight of ``shape``; None when it can."""
        return f"the weight is empty, {tuple(shape)}" if 0 in shape else self.mismatch(shape)

    def mismatch(self, shape: Shape) -> str | None:
        """:meth:`misfit` for a weight that is not empty; the half that algorithms override."""
        mine, given = tuple(self.shape), tuple(shape)
        # A linear layer is a 1 x 1 convolution, a 2-D kernel is a 3-D one of length 1.
        same = mine == given or (len(mine) != len(given) and _squeezed(mine) == _squeezed(given))
        flat = len(mine) == 2 and bool(given) and mine == (given[0], math.prod(given[1:]))
        return None if same or flat else f"its delta is {mine}, the weight is {given}"

    @classmethod
    def own(cls, tensors: Tensors, dims: int = 2) -> dict[str, Tensor]:
        """The factors of this algorithm among ``tensors``; empty when it has none there.

        Raises:
            AdapterLabError: a factor that is empty, holds no real numbers or has fewer than
                ``dims`` axes.
        """
        factors = {name: t for name, t in tensors.items() if cls.owns(name)}
        for name, t in factors.items():
            if t.ndim < dims:
                what = "is not a matrix" if dims == 2 else f"is not of {dims} axes"
            elif not t.is_floating_point():
                what = "holds no real numbers"
            elif not t.numel():
                what = "is empty, of rank 0 or no size"
            else:
                continue
            raise AdapterLabError(
                f"A factor of {cls.title} {what}",
                found=f"{name}, {str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}",
            )
        return factors

    @classmethod
    @lru_cache(1 << 10)
    def owns(cls, suffix: str) -> bool:
        """Whether a tensor of this name is one of its factors."""
        return suffix in cls.suffixes or numbered(suffix) in cls.suffixes


def numbered(suffix: str) -> str:
    """``suffix`` with a number at its end as ``*``: "oft_blocks.2" -> "oft_blocks.*"."""
    head, _, number = suffix.rpartition(".")
    return f"{head}.*" if number.isdecimal() else suffix


def _squeezed(shape: Shape) -> tuple[int, ...]:
    return (*shape[:2], *(n for n in shape[2:] if n != 1))


def require(factors: Tensors, *names: str) -> list[Tensor]:
    """The factors of these names; raises AdapterLabError when one of them is missing."""
    missing = ", ".join(name for name in names if name not in factors)
    if missing:
        raise AdapterLabError("A factor is missing", found=", ".join(factors), expected=missing)
    return [factors[name] for name in names]


def check_product(fits: bool, factors: Tensors, *names: str) -> None:
    """Raise AdapterLabError with the shapes of the named factors unless they fit together."""
    if not fits:
        found = ", ".join(f"{name} {tuple(factors[name].shape)}" for name in names)
        raise AdapterLabError("The factors do not multiply", found=found)


def read_scale(tensors: Tensors, rank: int, scale: float | None) -> float:
    """s = alpha / rank; ``scale`` from outside wins; a missing alpha means 1.

    Raises:
        AdapterLabError: rank 0, or an alpha that is no finite number.
    """
    if rank < 1:
        raise AdapterLabError("The rank is 0", expected="factors with at least one rank channel")
    if scale is not None:
        return scale
    return read_number(tensors, "alpha", rank) / rank


def read_number(tensors: Tensors, name: str, default: float, *, finite: bool = True) -> float:
    """The number that the tensor ``name`` holds; ``default`` without it.

    Raises:
        AdapterLabError: it has several values or none, or one that is complex, NaN or, unless
            ``finite`` is off, infinite.
    """
    tensor = tensors.get(name)
    if tensor is None:
        return default
    if tensor.numel() != 1 or tensor.is_complex():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterLabError(
            f"{name} is not a number",
            found=f"a tensor of shape {tuple(tensor.shape)}, {dtype}",
            expected="one value",
        )
    value = float(tensor.item())
    if math.isnan(value) or (finite and math.isinf(value)):
        raise AdapterLabError(f"{name} is not finite", found=str(value))
    return value
