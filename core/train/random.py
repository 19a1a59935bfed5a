"""Randomness that depends on the seed and on what it is for, on nothing else.

A stream is a pure function of (seed, purpose, numbers), so a resumed run draws what the
uninterrupted one would have drawn, and the global generators of torch are never touched.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def _entropy(seed: int, purpose: str, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "init ...") at one point (step, batch)."""
    state = _entropy(seed, purpose, numbers).generate_state(1, np.uint64)[0]
    # manual_seed takes a signed 64-bit number.
    return torch.Generator().manual_seed(int(state) >> 1)


def permutation(seed: int, purpose: str, length: int, *numbers: int) -> list[int]:
    """A shuffled ``range(length)``."""
    rng = np.random.default_rng(_entropy(seed, purpose, numbers))
    return [int(i) for i in rng.permutation(length)]
