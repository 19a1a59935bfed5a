"""What computed steps tell of a model, while it is calibrated.

Reference: Ma et al., MagCache (arXiv 2506.09045), section 3.2: magnitude ratio, its standard
deviation over tokens, and token-wise cosine distance of successive residuals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import AdapterLabError
from .calibration import Calibration, Curve, plain
from .trace import Parts, Trace

_linalg: Any = torch.linalg  # has no types

_CHUNK = 1 << 23  # values taken to float32 at a time, 32 MB a tensor
_EPS = 1e-8  # least norm in a cosine
_SMALLEST = 1e-6  # ratio, of a residual that vanishes


@dataclass(frozen=True)
class _Means:
    ratio: float
    spread: float
    cosine: float
    error: float  # of extrapolation; NaN where nothing tells


@dataclass(frozen=True)
class _Sample:
    """One evaluation: noise levels of the residuals before it, the last first, and its sums.

    ``sums``: tokens, of q - 1, of (q - 1)^2, of the cosine distance; tokens, of the error.
    """

    before: tuple[float, ...]
    sums: Tensor

    def means(self) -> _Means | None:
        """None where no token counted."""
        sums: list[float] = cast(Any, self.sums).tolist()
        n, first, second, cosine, m, error = sums
        if n == 0:
            return None
        mean = first / n
        variance = max((second - n * mean * mean) / max(n - 1, 1), 0.0)
        ratio, off = max(mean + 1, 0.0), error / m if m else math.nan
        return _Means(ratio, math.sqrt(variance), max(cosine / n, 0.0), off)


class Measure:
    """Statistics of one run, by branch and noise level.

    Several evaluations of a branch at one level (regional prompts, context windows, the second
    visit of samplers such as heun) are averaged.

    Args:
        axis: of channels: -1 for the tokens of blocks, 1 for a network's output.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._samples: dict[str, dict[float, list[_Sample]]] = {}

    def add(self, branch: str, sigma: float, trace: Trace, parts: Parts) -> None:
        """Take the residual ``parts``, in whose place ``trace`` has those before it.

        Nothing is read back from the device until ``finish``.
        """
        samples = self._samples.setdefault(branch, {}).setdefault(sigma, [])
        shapes = [part.shape for part in parts]
        fitting = [
            (level, residual)
            for level, residual in reversed(trace.points)
            if level > sigma and [part.shape for part in residual] == shapes
        ]
        if not fitting:
            return
        before = tuple(level for level, _ in fitting)
        # Of the line through the last two, as ``trace.first_order`` has it.
        weight = (sigma - before[1]) / (before[0] - before[1]) if len(before) > 1 else 0.0
        streams = zip(parts, *(residual for _, residual in fitting), strict=True)
        sums = [_sums(stream, weight, self.axis) for stream in streams]
        samples.append(_Sample(before, torch.stack(sums).sum(0)))

    def finish(
        self,
        fingerprint: str = "",
        level: str = "",
        architecture: str = "",
        steps: int = 0,
        **about: str,
    ) -> Calibration:
        """All of it.

        Args:
            steps: of the schedule; 0: as many as there were noise levels.

        Raises:
            AdapterLabError: less than two noise levels, or residuals that are not finite.
        """
        try:
            curves = {branch: _curve(samples) for branch, samples in self._samples.items()}
            level = level or ("blocks" if self.axis < 0 else "network")
            steps = steps or max((len(curve.sigmas) for curve in curves.values()), default=0)
            texts = {name: plain(text) for name, text in about.items()}
            return Calibration(fingerprint, level, architecture, steps, curves, texts)
        except AdapterLabError as error:
            raise AdapterLabError(
                "This run can't be calibrated", found=error.found, expected=error.expected
            ) from error


@torch.no_grad()
def _sums(stream: Sequence[Tensor], weight: float, axis: int) -> Tensor:
    """Of one stream: its residual, the last one and, if there is one, that before the last.

    Tokens whose residual was zero have no ratio and do not count.
    """
    device = stream[0].device
    total = torch.zeros(6, device=device)
    for pieces in _chunks([residual.to(device) for residual in stream], axis):
        now, last, *older = (piece.float() for piece in pieces)
        norm, before = _norm(now, axis), _norm(last, axis)
        counted = before != 0
        off = torch.where(counted, norm / before - 1, 0)
        both = norm.clamp_min(_EPS) * before.clamp_min(_EPS)
        cosine = torch.where(counted, 1 - (now * last).sum(axis) / both, 0)
        sums = [counted.sum(), off.sum(), (off * off).sum(), cosine.sum()]
        if older:
            some = norm != 0
            error = _norm(torch.lerp(older[0], last, weight).sub_(now), axis)
            sums += [some.sum(), torch.where(some, error / norm, 0).sum()]
        total[: len(sums)] += torch.stack([one.float() for one in sums])
    return total


def _norm(tensor: Tensor, axis: int) -> Tensor:
    return _linalg.vector_norm(tensor, dim=axis)


def _chunks(tensors: Sequence[Tensor], axis: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of about ``_CHUNK`` values each, cut across the longest axis but that of channels."""
    lengths: list[int] = list(tensors[0].shape)
    total, lengths[axis] = math.prod(lengths), 0
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    length = lengths[longest]
    size = max(1, _CHUNK * length // max(1, total))
    for start in range(0, length, size):
        yield tuple(t.narrow(longest, start, min(size, length - start)) for t in tensors)


def _curve(samples: dict[float, list[_Sample]]) -> Curve:
    levels = sorted(samples, reverse=True)
    rows, bends = [(levels[0], 1.0, 0.0, 0.0)], dict[float, float]()
    for sigma in levels[1:]:
        told = [(s.before, means) for s in samples[sigma] if (means := s.means()) is not None]
        if not told:  # what was first seen here
            continue
        above = rows[-1][0]
        # Of the interval from the level above, also where the last residual is older than that.
        ratios = [m.ratio ** ((above - sigma) / (before[0] - sigma)) for before, m in told]
        rows.append((
            sigma, max(_mean(ratios), _SMALLEST),
            _mean([m.spread for _, m in told]), _mean([m.cosine for _, m in told]),
        ))  # fmt: skip
        bent = [
            m.error / math.prod(level - sigma for level in before)
            for before, m in told
            if len(before) > 1 and not math.isnan(m.error)
        ]
        if bent:
            bends[sigma] = _mean(bent)
    sigmas, ratios, spread, cosine = zip(*rows, strict=True)
    return Curve(sigmas, ratios, spread, cosine, _everywhere(bends, sigmas))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _everywhere(bends: dict[float, float], sigmas: Sequence[float]) -> tuple[float, ...]:
    """That of the nearest level where none was measured."""
    return tuple(bends[min(bends, key=lambda b: abs(b - s))] for s in sigmas) if bends else ()
