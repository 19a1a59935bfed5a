"""LoKr: a Kronecker product, its factors full or low-rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Form, Kronecker, NarrowKronecker
from ..tensors import (
    Op,
    add_kron,
    factorization,
    kaiming_uniform,
    kron,
    rows_of,
    scaled,
    tucker,
    wide,
)
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .reading import check_product, read_number, read_scale, require

W1, W2, T2 = "lokr_w1", "lokr_w2", "lokr_t2"


class LoKr(Algorithm):
    """dW = s W1 (x) W2, s = alpha / r, or 1 when both factors are full.

    out = a c and in = b d; W1 (a, b) is the outer factor, W2 (c, d, *k) the inner one:
    dW[i c + k, j d + l, *] = s W1[i, j] W2[k, l, *]. Either may be low-rank: W1 = ``lokr_w1_a``
    (a, r) ``lokr_w1_b`` (r, b), W2 = ``lokr_w2_a`` (c, r) ``lokr_w2_b`` (r, d * prod(k)), or with
    ``lokr_t2`` T (r, r, *k) sum_pq A[p, c] T[p, q, *] B[q, d], A and B then being (r, c), (r, d).
    With two full factors nothing is divided by r, and alpha, which LyCORIS sets to the configured
    rank, is ignored; only a scale from outside (peft's config) applies.

    Reference: Yeh et al. 2023, "Navigating Text-To-Image Customization", section 3.
    """

    name = "lokr"
    title = "LoKr"
    trainable = True
    purpose = "a Kronecker product: smallest files, or with full factors the most capacity"
    folds = (W1, W1 + "_a")
    suffixes = (W1, W1 + "_a", W1 + "_b", W2, W2 + "_a", W2 + "_b", T2)

    def __init__(self, tensors: Tensors, scale: float, nominal_rank: float = 0.0) -> None:
        super().__init__(tensors, scale)
        self._nominal_rank = nominal_rank

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        ranks = [r for w in (W1, W2) if (r := _rank(factors, w)) is not None]
        if T2 in factors and W2 in factors:
            raise AdapterLabError(f"{T2} needs {W2}_a and {W2}_b", found=", ".join(factors))
        if math.prod(_shape(factors, W1)[2:]) != 1:
            raise AdapterLabError(f"{W1} is not a matrix", found=f"{_shape(factors, W1)}")
        if not ranks:
            # The configured rank, which LyCORIS stores as alpha here; nothing else tells it. In
            # float16 a rank of 10000000000 is infinite.
            nominal = read_number(tensors, "alpha", 0.0, finite=False)
            nominal = nominal if math.isfinite(nominal) else 0.0
            return cls(factors, 1.0 if scale is None else scale, nominal)
        if len(set(ranks)) > 1:
            raise AdapterLabError("The two factors differ in rank", found=f"{ranks}")
        return cls(factors, read_scale(tensors, ranks[0], scale))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """Everything kaiming-uniform but W2, or its second factor, which is zero without a scalar.

        A factor is low-rank where r is below half its longer side; W1 only with
        ``decompose_both``, neither with ``full_matrix``.
        """
        (out, width, *k), r = shape, config.rank
        (a, c), (b, d) = factorization(out, config.factor), factorization(width, config.factor)
        low1, low2 = (not config.full_matrix and r < n / 2 for n in (max(a, b), max(c, d)))
        shapes: dict[str, Shape] = {}
        if low1 and config.decompose_both:
            shapes |= {W1 + "_a": (a, r), W1 + "_b": (r, b)}
        else:
            shapes[W1] = (a, b)
        if not low2:
            shapes[W2] = (c, d, *k)
        elif config.tucker and any(n != 1 for n in k):
            shapes |= {W2 + "_a": (r, c), W2 + "_b": (r, d), T2: (r, r, *k)}
        else:
            shapes |= {W2 + "_a": (c, r), W2 + "_b": (r, d * math.prod(k))}
        tensors = {name: kaiming_uniform(size, generator) for name, size in shapes.items()}
        if not config.scalar:
            tensors[W2 + "_b" if low2 else W2].zero_()
        full = W1 in shapes and W2 in shapes
        return cls(tensors, 1.0 if full else config.scale, r)

    @property
    def full(self) -> bool:
        """Both factors are full."""
        return W1 in self.tensors and W2 in self.tensors

    @property
    def rank(self) -> int:
        """r of the low-rank factors; of two full ones the configured rank, but at most W2's own.

        LyCORIS users ask for full factors with ranks such as 10000 and 10000000000.
        """
        for factor in (W1 + "_b", W2 + "_b"):
            if factor in self.tensors:
                return len(self.tensors[factor])
        own = min(self.tensors[W2].flatten(1).shape)
        return int(min(self._nominal_rank, own)) if self._nominal_rank >= 1 else own

    @property
    def shape(self) -> tuple[int, ...]:
        (a, b), (c, d, *k) = _shape(self.tensors, W1)[:2], _shape(self.tensors, W2)
        return (a * c, b * d, *k)

    @property
    def alpha(self) -> float:
        return float(self._nominal_rank or self.rank) if self.full else super().alpha

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        if self.full:
            # No reader applies a scale to two full factors, so it goes into one of them.
            state[W2] = scaled(state[W2], self.scale)
        return state

    def delta(self, weight: Tensor) -> Tensor:
        return kron(self._first(weight), self._second(weight)).reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        rows = rows_of(weight)
        if rows is None:
            return super().merge(weight)
        add_kron(rows, self._first(weight), self._second(weight).flatten(1))
        return weight

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """s W1 X W2^T for a linear layer, where X (b, d) is x in rows; convolutions are rebuilt."""
        if op.dims:
            return super().bypass(x, op, weight, y)
        w1 = self._first(x).to(x.dtype)
        rows = x.reshape(*x.shape[:-1], w1.shape[1], -1)
        if W2 in self.tensors or T2 in self.tensors:
            w2 = self._second(x).flatten(1).to(x.dtype)
            (a, b), (c, d) = w1.shape, w2.shape
            inner_first = b * c * (d + a) <= a * d * (b + c)
            y = w1 @ (rows @ w2.T) if inner_first else (w1 @ rows) @ w2.T
        else:
            # W1 acts in the narrow space between the two factors of W2.
            left, right = (self.tensors[W2 + end].to(x).flatten(1) for end in ("_a", "_b"))
            y = (w1 @ (rows @ right.T)) @ left.T
        return y.flatten(-2)

    def form(self, like: Tensor) -> Form:
        first, scale = self._first(like), 1.0
        if W1 in self.tensors:
            first, scale = self.tensors[W1].to(like.device).flatten(1), self.scale
        if W2 in self.tensors or T2 in self.tensors:
            second = self.tensors[W2].to(like.device) if W2 in self.tensors else self._second(like)
            return Kronecker(first, second.flatten(1), scale=scale)
        left, right = (self.tensors[W2 + end].to(like.device).flatten(1) for end in ("_a", "_b"))
        (a, b), (c, r), d = first.shape, left.shape, right.shape[1]
        if r * (b * d + a * b + a * c) < b * c * (d + a):
            return NarrowKronecker(first, left, right, scale=scale)
        return Kronecker(first, wide(left, like) @ wide(right, like), scale=scale)

    def _first(self, like: Tensor) -> Tensor:
        """s W1, (a, b), wide."""
        if W1 in self.tensors:
            return wide(self.tensors[W1], like).flatten(1) * self.scale
        left, right = (wide(self.tensors[W1 + end], like).flatten(1) for end in ("_a", "_b"))
        return (left * self.scale) @ right

    def _second(self, like: Tensor) -> Tensor:
        """W2, (c, d, *k) or (c, d * prod(k)), wide."""
        if W2 in self.tensors:
            return wide(self.tensors[W2], like)
        left, right = (wide(self.tensors[W2 + end], like) for end in ("_a", "_b"))
        if T2 in self.tensors:
            return tucker(wide(self.tensors[T2], like), left.T, right)
        return (left.flatten(1) @ right.flatten(1)).reshape(len(left), *right.shape[1:])


def _rank(factors: Tensors, w: str) -> int | None:
    """r of the pair ``w``_a, ``w``_b; None when ``w`` is full."""
    pair = [w + "_a", w + "_b"]
    if w in factors and not any(name in factors for name in pair):
        return None
    if w in factors:
        both = ", ".join(name for name in factors if name.startswith(w))
        raise AdapterLabError(f"{w} is given twice", found=both, expected=f"{w} or its pair")
    a, b = require(factors, *pair)
    if w == W2 and T2 in factors:
        core = factors[T2]
        fits = a.ndim == b.ndim == 2 and (len(a), len(b)) == core.shape[:2]
        check_product(fits, factors, *pair, T2)
    else:
        check_product(a.flatten(1).shape[1] == len(b), factors, *pair)
    return len(b)


def _shape(factors: Tensors, w: str) -> tuple[int, ...]:
    if w in factors:
        return tuple(factors[w].shape)
    a, b = factors[w + "_a"], factors[w + "_b"]
    if w == W2 and T2 in factors:
        return (a.shape[1], b.shape[1], *factors[T2].shape[2:])
    return (len(a), *b.shape[1:])
