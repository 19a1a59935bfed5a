"""Diag-OFT: blocks of output rows, each rotated, and optionally every row rescaled."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import AdapterLabError
from ..forms import Layer, Mode, turned
from ..orthogonal import Blocks, Butterfly, cayley, exact, eye, shrunk, skew
from ..tensors import factorization, wide
from .base import AdapterConfig, Shape, Tensors
from .reading import read_number
from .rotation import Rotation, check_blocks

BLOCKS, DIAG, RESCALE = "oft_blocks", "oft_diag", "rescale"


class OFT(Rotation):
    """W'_k = R_k^T W_k on rows k b .. k b + b, times ``rescale`` (out, 1, ..).

    Q = B - B^T of ``oft_blocks`` B (n, b, b), R = (I + Q)(I - Q)^-1. An ``alpha`` > 0 is the
    constraint of COFT: ||Q||_F over all blocks is brought down to alpha * out. ``oft_diag``
    (n, b, b), of early LyCORIS files, is R itself. Strength m: R becomes m R + (1 - m) I, and
    ``rescale`` 1 + m (rescale - 1).

    Reference: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    sections 3.2 and 3.3; LyCORIS, whose einsum applies R transposed.
    """

    name = "oft"
    title = "Diag-OFT"
    trainable = True
    purpose = "rotates blocks of output rows, which keeps lengths and angles within them"
    suffixes = (BLOCKS, DIAG, RESCALE)
    finished_name = DIAG
    gains_name = RESCALE

    @classmethod
    def load(cls, tensors: Tensors, scale: float | None = None) -> Self | None:
        factors = cls.own(tensors, dims=1)
        names = [name for name in (BLOCKS, DIAG) if name in factors]
        if factors and len(names) != 1:
            expected = f"one of {BLOCKS} and {DIAG}"
            raise AdapterLabError("Which rotation?", found=", ".join(factors), expected=expected)
        if not factors or factors[names[0]].ndim == 4:  # of a butterfly
            return None
        check_blocks(cls.title, factors[names[0]], 3)
        return cls(factors, constraint=read_constraint(tensors))

    @classmethod
    def init(cls, shape: Shape, config: AdapterConfig, generator: torch.Generator) -> Self:
        """B zero, factors of rows 1; b is the smaller of ``factorization(out, rank)`` as in
        LyCORIS, but where that is 1, blocks of which nothing turns, the largest up to sqrt(out).

        Raises:
            AdapterLabError: out has no divisor from 2 to the rank and sqrt(out).
        """
        (b, n), (widest, more) = (factorization(shape[0], limit) for limit in (config.rank, -1))
        if b == 1 < widest <= config.rank:
            b, n = widest, more
        if b == 1:
            expected = "a divisor of them from 2 to the rank"
            raise no_blocks(cls.title, shape[0], config.rank, expected)
        zeros = torch.zeros(n, b, b, device=generator.device, dtype=torch.float32)
        gains = fresh_gains(shape, config, zeros)
        return cls({BLOCKS: zeros, **gains}, constraint=config.constraint)

    @property
    def rank(self) -> int:
        return self._blocks.shape[-1]

    @property
    def size(self) -> int:
        return len(self._blocks) * self.rank

    @property
    def traits(self) -> tuple[str, ...]:
        traits = ["COFT"] if BLOCKS in self.tensors and self.constraint > 0 else []
        return (*traits, *(name for name in (RESCALE,) if name in self.tensors))

    def changes(self, like: Tensor) -> list[Tensor]:
        return [self._change(exact(self._blocks, like))]

    def trained_change(self, like: Tensor) -> Tensor:
        """E in training, for :meth:`trained_turn`: float32 beside all but float64."""
        return self._change(wide(self._blocks, like))

    def trained_turn(self, change: Tensor) -> Blocks | Butterfly:
        """M from what :meth:`trained_change` gives, at strength 1."""
        return self.turn([change], self.size)

    def adapted(self, layer: Layer, x: Tensor, mode: Mode = "auto") -> Tensor:
        """y + (M - I) y of y without the bias, which is all that is kept.

        ``auto`` never rebuilds, which takes a product as large as the layer's own for the gradient.
        """
        if mode == "rebuild" or layer.op.groups > 1:
            return super().adapted(layer, x, mode)
        y, dims = layer.base(x), layer.op.dims
        rows = y.movedim(1, -1) if dims else y
        bias = None if layer.bias is None else layer.bias.to(y)
        new = turned(rows, bias, self.trained_change(y), self.trained_turn)
        gains = self._gains(new)
        if gains is not None:
            new = new + (new if bias is None else new - bias) * gains
        return new.movedim(-1, 1) if dims else new

    def _change(self, blocks: Tensor) -> Tensor:
        if DIAG in self.tensors:
            return blocks - eye(blocks)
        q, limit = skew(blocks), self.constraint * self.size
        return cayley(shrunk(q, limit) if limit > 0 else q)

    def turn(self, changes: list[Tensor], size: int) -> Blocks | Butterfly:
        return Blocks((changes[0].mT,))

    @property
    def _blocks(self) -> Tensor:
        return self.tensors[BLOCKS if BLOCKS in self.tensors else DIAG]


def fresh_gains(shape: Shape, config: AdapterConfig, like: Tensor) -> dict[str, Tensor]:
    """``rescale`` of 1 (out, 1, ..) where it is asked for."""
    return {RESCALE: like.new_ones(shape[0], *(1,) * (len(shape) - 1))} if config.rescale else {}


def no_blocks(title: str, rows: int, rank: int, expected: str) -> AdapterLabError:
    """What is wrong with a layer whose rows do not split into blocks."""
    return AdapterLabError(
        f"{title} has no blocks for this layer", found=f"{rows} rows, rank {rank}",
        expected=expected, fix="Choose another rank, or leave the layer out",
    )  # fmt: skip


def read_constraint(tensors: Tensors) -> float:
    """alpha of an OFT file, 0 (none) where it has none."""
    return read_number(tensors, "alpha", 0.0)
