"""The contract every algorithm obeys.

    W'(m) = W + dW(m)        m: the user's strength; m * dW for all that is additive

Weights are ``(out, in, *k)``, of a grouped convolution ``(out, in / groups, *k)``. Factors may be
stored in any dtype; a delta is computed in float32, in float64 for a weight in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Form, Layer, Mode, recomputed
from ..forms.layer import channels, unbiased
from ..tensors import Op, wide_dtype
from .config import AdapterConfig
from .draw import Draw
from .reading import Tensors

Shape = Sequence[int]
Run = Callable[..., Tensor]  # of an algorithm and activations


class Algorithm(ABC):
    """One adapter on one weight: its factors by suffix, and their scale.

    Attributes:
        name: registry name. title: as users write it.
        suffixes: tensor names it owns, in the spelling of LyCORIS/kohya ("lora_up.weight").
            ``alpha`` belongs to every algorithm and is not listed. ``*`` stands for one name.
        parameter: what of a layer it changes, "weight" or "bias".
        trainable: whether it can be chosen for training.
        purpose: of a trainable one, what it is for.
        untrained: of any other one, why it is read only.
        additive: whether its delta is added to a weight by itself, so that DoRA can turn it.
        up: factors whose learning rate LoRA+ raises; none where the two sides are alike.
        folds: factors that are multiplied to multiply the delta; none where there are no such.
        frozen: tensors that training leaves as they are.
        precise: tensors that have to be kept in float32.
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
    purpose: ClassVar[str] = ""
    untrained: ClassVar[str] = ""
    additive: ClassVar[bool] = True
    up: ClassVar[tuple[str, ...]] = ()
    folds: ClassVar[tuple[str, ...]] = ()
    frozen: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
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
        raise AdapterLabError(f"{cls.title} is read, not trained", found=cls.untrained)

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

        def run(same: Algorithm, x: Tensor) -> Tensor:
            return op(x, same.delta(weight).to(x))

        return self._again(run, x)

    def form(self, like: Tensor) -> Form | None:
        """What the delta of a linear layer is made of, on the device of ``like``; None where no
        form describes it."""
        return None

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        """f'(x) of a frozen layer in training, with gradients for the factors and x.

        What is made of the values of W is made again in the backward pass: a weight that is
        unpacked or streamed in at each use is never kept.

        Args:
            x: ``(..., in)`` or ``(b, in, *spatial)``.
            mode: whether h(x) is added to f(x), or W + dW built for it; the cheaper by default.
        """
        form = None if layer.op.dims else self.form(x)
        if form is not None:
            return form.adapted(layer, x, mode)
        if mode == "rebuild":
            return self._rebuilt(layer, x)
        y, op, reads = layer.base(x), layer.op, self.reads_weight
        known = [unbiased(y, layer)] if reads and self.reads_output else []
        if reads and (op.dims or not known):

            def run(same: Algorithm, x: Tensor, *y: Tensor) -> Tensor:
                return same.bypass(x, op, layer.weight(), *y)

            return y + self._again(run, x, *known)
        shape = self.shape if op.dims else (y.shape[-1], x.shape[-1])
        # Factors may hide the kernel.
        shape = shape if len(shape) == 2 + op.dims else layer.weight().shape
        # Only its shape and device matter: one number stands for all of W.
        return y + self.bypass(x, op, x.detach().new_empty(()).expand(shape), *known)

    def _rebuilt(self, layer: Layer, x: Tensor) -> Tensor:
        """op(x, W + dW) + bias, built again in the backward pass."""

        def run(same: Algorithm, x: Tensor) -> Tensor:
            weight = layer.weight().to(wide_dtype(x))
            return layer.op(x, (weight + same.delta(weight)).to(x))

        y, bias = self._again(run, x), layer.bias
        return y if bias is None else y + channels(bias, layer.op).to(y)

    def _again(self, run: Run, *inputs: Tensor) -> Tensor:
        """``run(self, *inputs)``, run once more in the backward pass: see :func:`recomputed`."""
        if not torch.is_grad_enabled():
            return run(self, *inputs)
        names, first = [n for n, t in self.tensors.items() if t.requires_grad], len(inputs)

        def rerun(*given: Tensor) -> Tensor:
            factors = dict(zip(names, given[first:], strict=True))
            return run(self.on({**self.tensors, **factors}), *given[:first])

        return recomputed(rerun, *inputs, *(self.tensors[n] for n in names))

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
    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes."""
        changes = {n: t for n, t in self.tensors.items() if t.is_floating_point()}
        return {n: t for n, t in changes.items() if n not in self.frozen}

    @property
    def needs_weight_to_start(self) -> bool:
        """Whether :meth:`started` has something to read from the weight."""
        return False

    def started(self, weight: Tensor) -> Algorithm:
        """The same told of W before training; its delta on W is exactly zero if it was fresh.

        Args:
            weight: W (out, in, *k) as it acts, of any dtype.
        """
        return self

    @property
    def draws(self) -> bool:
        """Whether it acts otherwise in training: whether :meth:`drawn` does anything."""
        return False

    def drawn(self, draw: Draw) -> Algorithm | None:
        """The same as it acts on one batch in training; None where it is left out.

        Gradients reach the tensors of this one through it.
        """
        return self

    @property
    def by_item(self) -> bool:
        """Whether it differs between the items of a batch: then only :meth:`bypass` is right."""
        return False

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
