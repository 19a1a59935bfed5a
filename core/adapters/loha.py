"""LoHa: the Hadamard product of two low-rank matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Hadamard
from ..tensors import Op, add_hadamard, hadamard, inner, khatri_rao, low_rank, normal, rows_of, wide
from .base import AdapterConfig, Algorithm, Shape, Tensors
from .reading import check_product, read_scale, require

HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class LoHa(Algorithm):
    """dW = s (B1 A1) o (B2 A2), s = alpha / r.

    Bi is ``hada_wi_a`` (out, r), Ai is ``hada_wi_b`` (r, in * prod(k)). With the Tucker cores
    ``hada_ti`` Ti (r, r, *k) each half is sum_pq Bi[p, o] Ti[p, q, *] Ai[q, i]; Bi is then stored
    transposed, (r, out), and Ai is (r, in).

    Reference: Hyeon-Woo et al. 2021, "FedPara", proposition 1 (plain) and 3 (Tucker).
    """

    name = "loha"
    title = "LoHa"
    trainable = True
    purpose = "rank r^2 from two factors of rank r"
    folds = ("hada_w1_a",)
    suffixes = tuple(name for names in zip(*HALVES, strict=True) for name in names)

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors)
        if not factors:
            return None
        cores = any(core in factors for _, _, core in HALVES)
        for names in HALVES:
            a, b, *core = require(factors, *(names if cores else names[:2]))
            if a.ndim != 2 or b.ndim != 2:
                found = f"{names[0]} {tuple(a.shape)}, {names[1]} {tuple(b.shape)}"
                raise AdapterLabError("LoHa factors must be matrices", found=found)
            if core:
                check_product((len(a), len(b)) == core[0].shape[:2], factors, *names)
            else:
                check_product(a.shape[1] == len(b), factors, *names[:2])
        self = cls(factors, read_scale(tensors, len(factors["hada_w1_b"]), scale))
        first, second = (self._half_shape(half) for half in HALVES)
        check_product(first == second, factors, *factors)
        return self

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """N(0, std) with std 0.1 for B1 and the cores, 1 for A1 and A2, and 0 for B2, which under
        a scalar is as B1."""
        (out, width, *k), r = shape, config.rank
        cores = config.tucker and any(n != 1 for n in k)
        columns = width if cores else math.prod((width, *k))
        tensors: dict[str, Tensor] = {}
        stds = (0.1, 0.1 if config.scalar else 0.0)
        for (a, b, core), std in zip(HALVES, stds, strict=True):
            tensors[a] = normal((r, out) if cores else (out, r), std, generator)
            tensors[b] = normal((r, columns), 1.0, generator)
            if cores:
                tensors[core] = normal((r, r, *k), 0.1, generator)
        return cls(tensors, config.scale)

    @property
    def rank(self) -> int:
        return len(self.tensors["hada_w1_b"])

    @property
    def shape(self) -> tuple[int, ...]:
        return self._half_shape(HALVES[0])

    def delta(self, weight: Tensor) -> Tensor:
        b1, a1, b2, a2 = self._factors(weight)
        return hadamard(b1, a1, b2, a2).reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        rows = rows_of(weight)
        b1, a1, b2, a2 = self._factors(weight)
        if rows is None or b1.shape != b2.shape:
            return super().merge(weight)
        add_hadamard(rows, b1, a1, b2, a2)
        return weight

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        """The product as one LoRA of rank r^2 where that takes fewer multiplications."""
        out, columns = weight.shape[0], math.prod(weight.shape[1:])
        if self.rank**2 * (out + columns) >= out * columns:
            return super().bypass(x, op, weight, y)
        b1, a1, b2, a2 = self._factors(x)
        down = khatri_rao(a1.T, a2.T).T.reshape(-1, *weight.shape[1:])
        return low_rank(x, op, khatri_rao(b1, b2).to(x.dtype), down.to(x.dtype))

    def form(self, like: Tensor) -> Hadamard:
        if HALVES[0][2] in self.tensors:
            return Hadamard(*self._factors(like))
        factors = (self.tensors[name].to(like.device) for half in HALVES for name in half[:2])
        return Hadamard(*factors, scale=self.scale)

    def _half_shape(self, half: tuple[str, str, str]) -> tuple[int, ...]:
        a, b, *core = (self.tensors[name] for name in half if name in self.tensors)
        return (a.shape[1], b.shape[1], *core[0].shape[2:]) if core else (len(a), b.shape[1])

    def _factors(self, like: Tensor) -> list[Tensor]:
        """s B1, A1, B2, A2 as (out, r) and (r, in * prod(k)), wide; cores contracted into Ai."""
        found: list[Tensor] = []
        for names in HALVES:
            a, b, *core = (wide(self.tensors[n], like) for n in names if n in self.tensors)
            found += [a.T, inner(core[0], b).flatten(1)] if core else [a, b]
        return [found[0] * self.scale, *found[1:]]
