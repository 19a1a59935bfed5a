"""Adapters of several algorithms fitted to a known change of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.lokr import W1, W2
from ..errors import AdapterLabError
from ..lowrank import Spectrum, dense
from ..tensors import length
from .factors import cast, decomposed, lora_of
from .gains import Gains
from .kronecker import Nearest
from .menus import DORA_AXES
from .noise import linalg
from .ranks import RankRule

_TURNS = 12
_ENOUGH = 1e-4  # of the change: what another turn has to gain
_WORTH = 1e-3  # of the change: by how much DoRA has to be nearer than LoRA
_LEAST = 0.1  # of a length, below which a factor that is divided by it would grow too large
_ROWS = 64  # that are compared at once
_SORTED = 1 << 24  # numbers that torch takes a quantile of


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        rule: what chooses the rank of each module. factor: how LoKr splits a dimension, -1 in two
            halves that are as equal as can be.
        dora_on: which axis of the weight has lengths under DoRA.
        clamp: quantile of the values of a LoRA's factors at which they are cut off, 1 for none.
        exact: whole decompositions and no random sketches. seed: of the sketches.

    Raises:
        AdapterLabError: a value out of its range.
    """

    rule: RankRule
    factor: int = -1
    dora_on: str = "input"
    clamp: float = 1.0
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 < self.clamp <= 1:
            raise AdapterLabError(
                "The clamp quantile is out of range", found=f"{self.clamp:g}",
                expected="above 0.5 and up to 1, which clamps nothing",
            )  # fmt: skip
        if self.dora_on not in DORA_AXES:
            raise AdapterLabError(
                "No such axis", found=self.dora_on, expected=f"one of {', '.join(DORA_AXES)}"
            )
        if self.factor < -1 or self.factor == 0:
            raise AdapterLabError(
                "No such factor", found=str(self.factor), expected="-1, or 1 or more"
            )


@dataclass(frozen=True)
class Fit:
    """An adapter of one weight.

    Attributes:
        made: what it is. tensors: by canonical suffix. rank: None where it has none.
        rest: ||D - dW||.
    """

    made: str
    tensors: dict[str, Tensor]
    rank: int | None
    rest: float

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


# (D (out, in, *k) float32, overwritten; W likewise where it is asked for; what to make, its dtype)
Fitting = Callable[[Tensor, Callable[[], Tensor], Settings, torch.dtype], Fit]


def lora(
    delta: Tensor, weight: Callable[[], Tensor], settings: Settings, dtype: torch.dtype
) -> Fit:
    """The LoRA nearest to ``delta``: its first singular values and vectors."""
    matrix = delta.flatten(1)
    clamps, rule = settings.clamp < 1, settings.rule
    if clamps and settings.exact:
        found = _signed(matrix)
    else:
        found = decomposed(matrix, rule, delta.shape, exact=settings.exact, seed=settings.seed)
    rank = rule.choose(found, delta.shape)
    if clamps:
        return _clamped(matrix, found.cut(rank), delta.shape, settings.clamp, dtype)
    tensors = lora_of(found, rank, delta.shape, dtype)
    return Fit("LoRA", tensors, rank, found.error(rank) * found.total)


def _signed(matrix: Tensor) -> Spectrum:
    """All of it with the signs that LAPACK gives the vectors, on which the quantile depends."""
    u, s, vh = linalg.svd(matrix, full_matrices=False)
    return Spectrum(u, s, vh, length(s), float(s.double().sum()))


def _clamped(
    matrix: Tensor, cut: Spectrum, shape: Sequence[int], quantile: float, dtype: torch.dtype
) -> Fit:
    """U S and V^T with what is beyond a quantile of all their values cut off.

    Reference: sd-scripts ``networks/extract_lora_from_models.py``, the same numbers.
    """
    up, down = cut.u * cut.s, cut.vh
    values = torch.cat([up.flatten(), down.flatten()])
    limit = float(_quantile(values, quantile))
    up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    kept = float(((matrix @ down.T) * up).sum())
    square = float(((up.T @ up) * (down @ down.T)).sum())
    rest = math.sqrt(max(0.0, cut.total**2 - 2 * kept + square))
    rank, ones = up.shape[1], (1,) * (len(shape) - 2)
    tensors = {
        "lora_up.weight": cast(up.reshape(*up.shape, *ones), dtype, "lora_up"),
        "lora_down.weight": cast(down.reshape(rank, *shape[1:]), dtype, "lora_down"),
        "alpha": torch.tensor(float(rank)),
    }
    return Fit("LoRA", tensors, rank, rest)


def _quantile(values: Tensor, share: float) -> Tensor:
    """By linear interpolation, of any number of values."""
    if values.numel() <= _SORTED:
        return values.quantile(share)
    ordered = values.sort().values
    place = share * (values.numel() - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def dora(
    delta: Tensor, weight: Callable[[], Tensor], settings: Settings, dtype: torch.dtype
) -> Fit:
    """W' = (W + B A) with each input, or output, times g; the plain LoRA of the same rank where
    that is as near.

    W' - W g = B A g has rank r too. So for a given g the best factors are an SVD, and for given
    factors g is a regression of W' - B A g on W, one number for each input: by turns the error
    falls. dora_scale is the length of each input of W', float32 since it is as large as W itself.
    """
    plain = lora(delta, weight, settings, dtype)
    rank, total = plain.rank or 1, length(delta)
    gains = Gains(weight(), settings.dora_on == "input")
    target, low = delta.view(len(delta), -1), None  # target: W' - W g
    gain, rest = torch.ones(len(gains.squares)), math.inf
    for _ in range(_TURNS):
        step = gains.step(target, low)
        gain = gain + step
        target.addcmul_(gains.spread(step), gains.base, value=-1)
        low = dense(target, rank, exact=settings.exact, seed=settings.seed).cut(rank)
        before, rest = rest, low.error(rank) * low.total
        if rest > before - _ENOUGH * total:
            break
    if low is None or rest > plain.rest - _WORTH * total or not bool((gain > _LEAST).all()):
        return plain
    return Fit("DoRA", gains.turned(gain, low, delta.shape, dtype), rank, rest)


def lokr(
    delta: Tensor, weight: Callable[[], Tensor], settings: Settings, dtype: torch.dtype
) -> Fit:
    """The Kronecker product nearest to ``delta``, its second factor low-rank where that saves."""
    nearest = Nearest(delta, settings.factor, exact=settings.exact, seed=settings.seed)
    second = nearest.spectrum()
    (c, d), kernel = (nearest.c, nearest.d), nearest.kernel
    rank = settings.rule.choose(second, (c, d, *kernel))
    # LyCORIS takes a factor for low-rank by its names alone, and makes one below half its side.
    if rank * (c + nearest.columns) >= c * nearest.columns:
        w1, w2, rest = nearest.full()
        tensors = {W1: cast(w1, dtype, W1), W2: cast(w2, dtype, W2)}
        return Fit("LoKr", {**tensors, "alpha": torch.tensor(float(rank))}, None, rest)
    w1, cut, rest = nearest.low(rank)
    factors = lora_of(cut, rank, (c, nearest.columns), dtype)
    size = length(cut.s) ** (1 / 3)  # what each of the three factors gets
    spread = {W2 + "_a": factors["lora_up.weight"], W2 + "_b": factors["lora_down.weight"]}
    tensors = {W1: w1 * size, **{n: t.float() / math.sqrt(size) for n, t in spread.items()}}
    return Fit("LoKr", {n: cast(t, dtype, n) for n, t in tensors.items()} | {
        "alpha": torch.tensor(float(rank))}, rank, rest)  # fmt: skip


def full(
    delta: Tensor, weight: Callable[[], Tensor], settings: Settings, dtype: torch.dtype
) -> Fit:
    """All of ``delta``, as it is."""
    stored = cast(delta, dtype, "diff")
    parts = zip(torch.split(stored, _ROWS), torch.split(delta, _ROWS), strict=True)
    rest = 0.0 if stored is delta else math.hypot(*(length(s - d) for s, d in parts))
    return Fit("Full", {"diff": stored}, None, rest)


FITS: dict[str, Fitting] = {"lora": lora, "lokr": lokr, "dora": dora, "full": full}
