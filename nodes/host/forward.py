"""The forward of one layer with adapters beside it: y = f(x) + sum of h(x).

Every h is that of the layer's own weight as it is, so the order of adapters does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from ...core.adapters import Algorithm
from .layers import operation, parameters
from .parts import Part


class Run(Protocol):
    """What a layer needs to know of the sampling it is part of: its progress, 0 to 1."""

    progress: float


class Factors(nn.Module):
    """The factors of a part, where ComfyUI can count and move them."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        for number, tensor in enumerate(part.algorithm.tensors.values()):
            # What was read in inference mode can be wrapped nowhere else.
            strange = tensor.is_inference() and not torch.is_inference_mode_enabled()
            own = nn.Parameter(tensor.clone() if strange else tensor, requires_grad=False)
            self.register_parameter(str(number), own)


class Forward:
    """Stands in for ``module.forward`` from its making until ``remove``.

    Above one of another clone, which ComfyUI can put on while this is on, it is in its place, and
    gives the place back.
    """

    def __init__(self, module: Any, factors: Iterable[Factors], run: Run) -> None:
        given = vars(module).get("forward")
        self.below = given if isinstance(given, Forward) else None
        self.module, self.run = module, run
        self.op, self.shape = operation(module), tuple(module.weight.shape)
        self.terms = [_Term(f) for f in factors]
        self.was_replaced = self.below.was_replaced if self.below else given is not None
        self.previous: Callable[..., Tensor] = self.below.previous if self.below else module.forward
        self.is_active = True
        module.forward = self

    def remove(self) -> None:
        """Restore what was there; where others took the place since, only stop to act."""
        self.is_active = False
        if vars(self.module).get("forward") is not self:
            return
        below = self.below
        while below and not below.is_active:
            below = below.below
        if below or self.was_replaced:
            self.module.forward = below or self.previous
        else:
            del self.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.previous(*args, **kwargs)
        return self.added(args[0] if args else kwargs["input"], out, out)

    def added(self, x: Tensor, own: Tensor, out: Tensor) -> Tensor:
        """``out`` and the h(x) of the adapters; ``own`` is f(x), which some of them turn.

        Without autograd ``out`` is changed in place.
        """
        terms = self.terms if self.is_active else ()
        acting = [t for t in terms if t.set(self.run.progress, x.device)]
        if not acting:
            return out
        with self._parameters(x, [term.algorithm for term in acting]) as (weight, bias):
            y = own if bias is None else own - self._along(bias).to(own.dtype)
            added = [(t.part.slice, self._term(t, x, y, weight, bias)) for t in acting]
        # The layers of a backward pass may need what they gave as it was.
        out = out.clone() if torch.is_grad_enabled() else out
        for span, h in added:
            rows = out if not span or span[0] else out.narrow(self._channels, *span[1:])
            rows.add_(h)
        return out

    @property
    def _channels(self) -> int:
        return -1 - self.op.dims

    def _along(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *(1,) * self.op.dims)

    @contextmanager
    def _parameters(
        self, x: Tensor, algorithms: Iterable[Algorithm]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias; of what none of ``algorithms`` reads no more than a shape, or None."""
        needed = [a for a in algorithms if a.reads_weight]
        values = self.op.groups > 1 or not all(a.reads_output for a in needed)
        shape = x.new_empty(1).expand(self.shape)
        if not needed or not (values or self.module.bias is not None):
            yield shape, None
            return
        with parameters(self.module, x.device, values=values) as (weight, bias):
            yield weight if values else shape, bias

    def _term(
        self, term: _Term, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """h(x), of the rows of the part where it has a range of rows."""
        part = term.part
        if part.name == "bias":
            like = x.new_empty(1).expand(self.shape[:1]) if bias is None else bias
            rows = like if part.slice is None else like.narrow(*part.slice)
            return self._along(term.algorithm.delta(rows))
        axis, *span = part.slice or (0, 0, self.shape[0])
        piece = weight.narrow(axis, *span)
        algorithm = term.on(piece)
        if axis == 0 and (part.slice is None or self.op.groups == 1):
            known = y.narrow(self._channels, *span) if algorithm.reads_weight else None
            return algorithm.bypass(x, self.op, piece, known)
        dense = x.new_zeros(self.shape)
        dense.narrow(axis, *span).copy_(algorithm.delta(piece))
        whole = self.op(x, dense)
        return whole if axis else whole.narrow(self._channels, *span)


class _Term:
    """A part on a layer; keeps the algorithm at its strength while that lasts."""

    def __init__(self, factors: Factors) -> None:
        self.factors, self.part = factors, factors.part
        self.algorithm = factors.part.algorithm
        self._placed: tuple[tuple[Any, ...], Algorithm] = ((), self.algorithm)
        self._device: torch.device | None = None
        self._strength: float | None = None
        self._is_settled = False

    def set(self, progress: float, device: torch.device) -> bool:
        """Bring the algorithm to its strength on ``device``; False where that is 0."""
        factors: Any = tuple(self.factors._parameters.values())
        changed = any(a is not b for a, b in zip_longest(factors, self._placed[0]))
        if changed or device != self._device:
            moved = (factor.to(device) for factor in factors)
            on = self.part.algorithm.on(dict(zip(self.part.algorithm.tensors, moved, strict=True)))
            self._placed, self._strength, self._is_settled = (factors, on), None, False
            self._device = device
        strength = self.part.at(progress)
        if strength and strength != self._strength:
            self.algorithm, self._strength = self._placed[1].at(strength), strength
        return strength != 0

    def on(self, weight: Tensor) -> Algorithm:
        """The algorithm, settled for this weight at its first use."""
        if not self._is_settled:
            factors, algorithm = self._placed
            self._placed, self._is_settled = (factors, algorithm.settled(weight)), True
            self.algorithm = self._placed[1].at(self._strength or 0.0)
        return self.algorithm
