"""Rows of modules, one below the other, as one LoRA: for what can't be cut or joined exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import ALGORITHMS, Algorithm, Tensors, load_parts
from ..keys import fuse
from ..keys.dialect import BIAS
from ..lowrank import Spectrum, dense, factored, until
from .factors import Pair, dense_sum, lora_of, pairs
from .ranks import RankRule

ERROR = 0.01  # of the delta, where no rank is asked for; musubi keeps 99.99 % of its energy
LARGEST = 128  # rank of a delta that has no thin factors, unless asked for
Pieces = Sequence[tuple[Tensors | None, int]]
Found = Sequence[tuple[Algorithm | None, int]]


class Approximation:
    """Called with the pieces of a weight: see :class:`core.keys.writer.Approximate`.

    Args:
        rank: of the LoRA; 0: the smallest with an error of ``ERROR``, of deltas without thin
            factors at most ``LARGEST``.
    """

    def __init__(self, rank: int = 0, seed: int = 0) -> None:
        self._rule = RankRule("fixed", rank=rank) if rank else RankRule("error", ERROR)
        self._seed = seed

    def __call__(
        self, pieces: Pieces, rows: Tensor | None
    ) -> tuple[dict[str, Tensor], float] | None:
        found = [(load_parts(t).get("weight") if t else None, n) for t, n in pieces]
        given = [tensors for tensors, _ in pieces if tensors]
        known = [algorithm for algorithm, _ in found if algorithm is not None]
        if len(known) < len(given) or any(a.reads_weight or a.whole for a in known):
            return None
        biases = _biases(pieces, rows)
        if biases is None or len({a.shape[1:] for a in known}) > 1:
            return None
        total = sum(n for _, n in found) if rows is None else len(rows)
        shape = (total, *known[0].shape[1:])
        spectrum = self._spectrum(found, rows, shape)
        rank = self._rule.choose(spectrum, shape)
        made = lora_of(spectrum, rank, shape, _dtype(given))
        return {**made, **biases}, spectrum.error(rank)

    def _spectrum(self, found: Found, rows: Tensor | None, shape: tuple[int, ...]) -> Spectrum:
        thin = _thin(found, rows)
        if thin and sum(up.shape[1] for up, _ in thin) < min(shape[0], thin[0][1].shape[1]):
            return factored(thin)
        parts = [
            torch.zeros(n, *shape[1:]) if a is None else dense_sum([(a, 1.0)], (n, *shape[1:]))
            for a, n in found
        ]
        matrix = torch.cat(parts).flatten(1)
        matrix = matrix if rows is None else matrix[rows]
        if self._rule.rule == "fixed":
            return dense(matrix, self._rule.cap(shape), seed=self._seed)
        self_limited = RankRule("error", ERROR, rank=LARGEST)
        return until(matrix, lambda known: self_limited.settled(known, shape), seed=self._seed)


def _thin(found: Found, rows: Tensor | None) -> list[Pair]:
    """Factors of all, up over all rows; none where one has none."""
    total, start = sum(n for _, n in found), 0
    thin: list[Pair] = []
    for algorithm, n in found:
        some = [] if algorithm is None else pairs(algorithm)
        if some is None:
            return []
        for up, down in some:
            tall = up.new_zeros(total, up.shape[1])
            tall[start : start + n] = up
            thin.append((tall if rows is None else tall[rows], down))
        start += n
    return thin


def _biases(pieces: Pieces, rows: Tensor | None) -> dict[str, Tensor] | None:
    """What the modules do to a bias, which is exact; None where it can't be."""
    owners = [a for a in ALGORITHMS.values() if a.parameter == "bias"]
    own = [({s: t for s, t in (tensors or {}).items() if any(a.owns(s) for a in owners)}, n)
           for tensors, n in pieces]  # fmt: skip
    if any(BIAS in (tensors or {}) for tensors, _ in pieces):
        return None
    if not any(tensors for tensors, _ in own):
        return {}
    return fuse.join(own) if rows is None else fuse.take(own[0][0], rows)


def _dtype(given: Sequence[Tensors]) -> torch.dtype:
    """The widest of the factors."""
    found = [t.dtype for tensors in given for t in tensors.values()
             if t.is_floating_point() and t.numel() > 1]  # fmt: skip
    dtype = found[0] if found else torch.float32
    for other in found:
        dtype = torch.promote_types(dtype, other)
    return dtype
