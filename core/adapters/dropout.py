"""Dropout of rank channels, of output rows, of activations and of whole modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..forms.layer import channels
from ..tensors import Op
from .base import Algorithm
from .draw import Draw, thinned
from .ia3 import IA3, WEIGHT
from .lora import LoRA
from .oft import BLOCKS
from .ranks import ByItem, Ranks
from .rotation import Rotation
from .wrapper import Acting, Wrapper


@dataclass(frozen=True)
class Rates:
    """Probabilities, 0 to below 1.

    Args:
        plain: of an element: of the rank activations A x of a LoRA (sd-scripts, musubi-tuner), of
            h(x) of everything else (LyCORIS in bypass).
        rank: of a rank channel of a LoRA, for each item of the batch by itself (sd-scripts,
            musubi-tuner); of a block of a rotation, which is then none (peft); of an output row of
            the delta of everything else, alike for the batch (musubi-tuner).
        module: of the whole module, alike for the batch (all of them).

    What stays is divided by 1 - p, but for rotations and modules: they are kept whole or not.

    Reference: sd-scripts ``networks/lora.py``, musubi-tuner ``networks/loha.py``; rotations: Liu et
    al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", its
    multiplicative dropout.
    """

    plain: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class Dropout(Acting):
    """``inner``, of which parts are left out of each batch in training."""

    def __init__(self, inner: Algorithm, rates: Rates) -> None:
        super().__init__(inner)
        self.rates = rates

    @property
    def draws(self) -> bool:
        return True

    def drawn(self, draw: Draw) -> Algorithm | None:
        rates = self.rates
        if rates.module and not draw.kept((1,), rates.module).item():
            return None
        inner = self.inner.drawn(draw)
        if inner is None:
            return None
        if isinstance(inner, (LoRA, Ranks)):
            return _without_ranks(inner, rates, draw)
        if rates.rank:
            inner = _without_rows(inner, rates.rank, draw)
        return Thinned(inner, rates.plain, draw.seed()) if rates.plain else inner


class Rows(Wrapper):
    """diag(v) dW: output rows of the delta masked.

    Args:
        rows: v, (out,).
    """

    def __init__(self, inner: Algorithm, rows: Tensor) -> None:
        super().__init__(inner)
        self.rows = rows

    def delta(self, weight: Tensor) -> Tensor:
        delta = self.inner.delta(weight)
        return delta * self.rows.to(delta).reshape(-1, *(1,) * (delta.ndim - 1))

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.inner.bypass(x, op, weight, y)
        return h * channels(self.rows, op).to(h)


class Thinned(ByItem):
    """h(x) with dropout."""

    def __init__(self, inner: Algorithm, rate: float, seed: int) -> None:
        super().__init__(inner)
        self.rate, self.seed = rate, seed

    def bypass(self, x: Tensor, op: Op, weight: Tensor, y: Tensor | None = None) -> Tensor:
        return thinned(self.inner.bypass(x, op, weight, y), self.rate, self.seed)


def _without_ranks(inner: LoRA | Ranks, rates: Rates, draw: Draw) -> Ranks | LoRA:
    lora, mask = (inner.lora, inner.mask) if isinstance(inner, Ranks) else (inner, None)
    if rates.rank:
        width = lora.rank if mask is None else mask.shape[1]
        kept = draw.kept((draw.items, width), rates.rank) / (1 - rates.rank)
        mask = kept if mask is None else mask * kept
    if mask is None and not rates.plain:
        return lora
    return Ranks(lora, mask, rates.plain, draw.seed() if rates.plain else 0)


def _without_rows(inner: Algorithm, rate: float, draw: Draw) -> Algorithm:
    if isinstance(inner, Rotation):
        blocks = inner.tensors[BLOCKS]
        kept = draw.kept((*blocks.shape[:-2], 1, 1), rate)
        return inner.on({**inner.tensors, BLOCKS: blocks * kept.to(blocks)})
    if isinstance(inner, IA3):
        kept = draw.kept(inner.vector.shape, rate) / (1 - rate)
        return inner.on({**inner.tensors, WEIGHT: inner.vector * kept.to(inner.vector)})
    return Rows(inner, draw.kept(inner.shape[:1], rate) / (1 - rate))
