"""GLoRA: a low-rank delta of the weight, and one of its input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..tensors import Op, kaiming_uniform, low_rank, unit_axes, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .reading import check_product, read_scale, require

A1, A2, B1, B2, CORE = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"
# The names of A_up, A_down, B_up, B_down: since LyCORIS 3.0, and before.
_ORDERS = ((A1, A2, B1, B2), (A2, A1, B2, B1))


class _Factors(NamedTuple):
    """A = ``a_up`` (in, r) ``a_down`` (r, in); B = ``b_up`` (out, r) ``b_down`` (r, in, *k)."""

    a_up: Tensor
    a_down: Tensor
    b_up: Tensor
    b_down: Tensor


class GLoRA(Algorithm):
    """dW = s (W A + B), s = alpha / r, so that f'(x) = f(x + s A x) + s B x.

    A = ``a1`` (in, r) ``a2`` (r, in), B = ``b1`` (out, r) ``b2`` (r, in, *k). A convolution has A
    and b1 with unit axes; A then acts on the channels, dW[o, i, *] = s sum_j W[o, j, *] A[j, i].
    Files of LyCORIS before 3.0 have the numbers 1 and 2 the other way round. The shapes tell;
    where a square layer lets them mean both, the reading of the lower rank is taken, and of two
    equal ranks the current one. With rs-LoRA LyCORIS stores alpha undivided, and nothing tells.

    Reference: Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient
    Fine-tuning", section 3.2, equation 10, its terms A and B.
    """

    name = "glora"
    title = "GLoRA"
    trainable = True
    purpose = "a LoRA of the weight and one of its input"
    folds = (A2, B2)
    suffixes = (A1, A2, B1, B2)
    reads_weight = True

    def __init__(self, tensors: Tensors, scale: float) -> None:
        super().__init__(tensors, scale)
        fitting = [names for names in _ORDERS if _fits(tensors, *names)]
        self._names = min(fitting, key=lambda names: len(tensors[names[1]]))

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        if CORE in tensors:
            raise AdapterLabError(f"{CORE} is not supported", found=", ".join(tensors))
        require(factors, A1, A2, B1, B2)
        check_product(any(_fits(factors, *names) for names in _ORDERS), factors, A1, A2, B1, B2)
        loaded = cls(factors, 1.0)
        loaded.scale = read_scale(tensors, loaded.rank, scale)
        return loaded

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """a1 and b1 kaiming-uniform, a2 and b2 zero, or under a scalar as a1 and b1."""
        (out, width, *k), r = shape, config.rank
        unit = (1,) * len(k)
        device = generator.device
        tensors = {
            A1: kaiming_uniform((width, r, *unit), generator),
            A2: torch.zeros(r, width, *unit, device=device, dtype=torch.float32),
            B1: kaiming_uniform((out, r, *unit), generator),
            B2: torch.zeros(r, width, *k, device=device, dtype=torch.float32),
        }
        if config.scalar:
            tensors |= {name: kaiming_uniform(tensors[name].shape, generator) for name in (A2, B2)}
        return cls(tensors, config.scale)

    @property
    def rank(self) -> int:
        return len(self.tensors[self._names[1]])

    @property
    def shape(self) -> tuple[int, ...]:
        *_, up, down = (self.tensors[name] for name in self._names)
        return (len(up), *down.shape[1:])

    def mismatch(self, shape: Shape) -> str | None:
        misfit, width = super().mismatch(shape), self.shape[1]
        if misfit is None and tuple(shape[1:2]) != (width,):
            return f"it acts on {width} input channels, the weight is {tuple(shape)}"
        return misfit

    def delta(self, weight: Tensor) -> Tensor:
        f, w = self._factors(weight), wide(weight, weight)
        if weight[0, 0].numel() == 1:
            left, right = _joined(w, f)
            return (left @ right).mul_(self.scale).reshape(weight.shape)
        dense = (f.b_up @ f.b_down.flatten(1)).reshape(weight.shape)
        dense += torch.einsum("oj...,ji->oi...", _narrow(w, f), f.a_down)
        return dense.mul_(self.scale)

    def merge(self, weight: Tensor) -> Tensor:
        """W += s [W a1 | b1] [a2; b2], for a kernel of 1 without a dense dW."""
        if weight[0, 0].numel() != 1:
            return weight.add_(self.delta(weight))
        left, right = _joined(weight, self._factors(weight))
        weight.view(weight.shape[:2]).addmm_(left, right, alpha=self.scale)
        return weight

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """s (op(a2 x, W a1) + b1 op(x, b2)): with W a1 in the place of W, r channels meet it."""
        f = self._factors(x)
        narrow = _narrow(wide(weight, x), f) * self.scale
        h = on_channels(x, op, f.a_down.to(x.dtype))
        b_up, b_down = (f.b_up * self.scale).to(x.dtype), f.b_down.to(x.dtype)
        b_down = b_down.reshape(len(b_down), *weight.shape[1:])
        return op(h, narrow.to(x.dtype)) + low_rank(x, op, b_up, b_down)

    def _factors(self, like: Tensor) -> _Factors:
        a_up, a_down, b_up, b_down = (wide(self.tensors[name], like) for name in self._names)
        return _Factors(a_up.flatten(1), a_down.flatten(1), b_up.flatten(1), b_down)


def on_channels(x: Tensor, op: Op, matrix: Tensor) -> Tensor:
    """``matrix`` (n, in / groups) on the input channels of a layer, alike in every group."""
    if not op.dims:
        return op(x, matrix)
    grouped = x.reshape(len(x) * op.groups, -1, *x.shape[2:])
    h = Op(op.dims)(grouped, unit_axes(matrix, op.dims))
    return h.reshape(len(x), -1, *x.shape[2:])


def _narrow(weight: Tensor, f: _Factors) -> Tensor:
    """W a1, (out, r, *k)."""
    return torch.einsum("oi...,ij->oj...", weight, f.a_up)


def _joined(weight: Tensor, f: _Factors) -> tuple[Tensor, Tensor]:
    """[W a1 | b1] (out, 2 r) and [a2; b2] (2 r, in) for a weight whose kernel is 1."""
    narrow = weight.reshape(weight.shape[:2]) @ f.a_up
    return torch.cat((narrow, f.b_up), 1), torch.cat((f.a_down, f.b_down.flatten(1)))


def _fits(factors: Tensors, *names: str) -> bool:
    """Whether the factors multiply if A_up, A_down, B_up and B_down have these names."""
    a_up, a_down, b_up, b_down = (factors[name] for name in names)
    rank, width = len(a_down), len(a_up)
    point = all(t[0].numel() == t.shape[1] for t in (a_up, a_down, b_up))
    ranks = a_up.shape[1] == b_up.shape[1] == len(b_down) == rank
    return point and ranks and a_down.shape[1] == b_down.shape[1] == width
