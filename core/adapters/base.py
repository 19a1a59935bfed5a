"""The contract every algorithm obeys.

    W' = W + m * dW          m: the user's strength, dW: what the factors stand for

Weights are ``(out, in, *k)``. Factors may be stored in any dtype; all maths is in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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


class Algorithm(ABC):
    """One adapter on one weight: its factors by suffix, and their scale.

    Attributes:
        name: registry name. title: as users write it.
        suffixes: tensor names it owns, in the spelling of LyCORIS/kohya ("lora_up.weight").
            ``alpha`` belongs to every algorithm and is not listed.
        tensors: suffix -> factor, without alpha.
        scale: s in dW = s * (...), alpha / r unless the algorithm says otherwise.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, tensors: Tensors, scale: float) -> None:
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
    @abstractmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Fresh float32 factors for a weight of ``shape``; the delta is exactly zero."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """r, the number that alpha is divided by."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in, *k), or (out, in * prod(k)) where the factors hide k."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """dW at strength 1, float32, in the shape and on the device of ``weight``."""

    def bypass(self, x: Tensor, op: Op, weight: Tensor) -> Tensor:
        """h(x) with f(x) + h(x) = op(x, W + dW); overridden where no dense dW is needed.

        Args:
            x: input of the layer, ``(..., in)`` or ``(b, in, *spatial)``.
            op: the layer without its weight.
            weight: W, (out, in, *k); may be quantised, most algorithms only read its shape.
        """
        return op(x, self.delta(weight).to(x.dtype))

    def state(self) -> dict[str, Tensor]:
        """Suffix -> tensor as a file holds it, ``alpha`` included."""
        return {**self.tensors, "alpha": torch.tensor(self.alpha)}

    @property
    def alpha(self) -> float:
        """What a file stores so that alpha / rank gives the scale back."""
        return self.scale * self.rank

    def misfit(self, shape: Shape) -> str | None:
        """Why the delta cannot be added to a weight of ``shape``; None when it can."""
        mine, size = self.shape, 1
        for n in shape:
            size *= n
        own = 1
        for n in mine:
            own *= n
        if mine[0] == shape[0] and own == size:
            return None
        return f"its delta is {tuple(mine)}, the weight is {tuple(shape)}"


def read_scale(tensors: Tensors, rank: int, scale: float | None) -> float:
    """s = alpha / rank; ``scale`` from outside wins; a missing alpha means 1.

    Raises:
        AdapterLabError: rank 0, or an alpha of several values.
    """
    if rank < 1:
        raise AdapterLabError("The rank is 0", expected="factors with at least one rank channel")
    alpha = tensors.get("alpha")
    if scale is not None or alpha is None:
        return 1.0 if scale is None else scale
    if alpha.numel() != 1:
        raise AdapterLabError(
            "alpha is not a number",
            found=f"a tensor of shape {tuple(alpha.shape)}",
            expected="one value",
        )
    return float(alpha.item()) / rank
