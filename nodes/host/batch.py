"""What is random in an adapter, the same for all passes of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...core.adapters import Algorithm
from ...core.adapters.draw import Draw
from ...core.train.random import generator

Call = Callable[..., Any]


class _Pass(NamedTuple):
    """A forward pass: its batch in the run, its place there, and the noise levels (b,)."""

    number: int
    part: int
    t: Tensor


class Batch:
    """The algorithms as they act on one batch.

    Drawn anew at each use from a generator in the same state: what a checkpointed block computes
    from its factors has to be computed again with it.

    Args:
        adapters: path -> algorithm.
        seed: of everything drawn.
    """

    def __init__(self, adapters: Mapping[str, Algorithm], seed: int) -> None:
        self.adapters, self.seed = adapters, seed
        self._draws = any(algorithm.draws for algorithm in adapters.values())
        self._now: _Pass | None = None

    def begin(self, number: int, t: Tensor, part: int = 0) -> None:
        """The next pass is ``part`` of batch ``number``, of noise levels ``t`` (b,)."""
        # Where nothing is drawn, nothing waits for the device.
        t = t.detach().to("cpu", copy=True) if self._draws else t.detach()
        self._now = _Pass(number, part, t)

    def end(self) -> None:
        """The next passes are without chance."""
        self._now = None

    def current(self, path: str) -> Algorithm | None:
        """The algorithm of ``path``; None where this pass leaves it out."""
        algorithm, now = self.adapters[path], self._now
        if now is None or not algorithm.draws:
            return algorithm
        rng = generator(self.seed, f"draw {path}", now.number, now.part)
        return algorithm.drawn(Draw(rng, now.t))

    def bound(self, call: Call) -> Call:
        """``call`` under what is drawn now, also once other passes have begun."""
        then = self._now

        def again(*args: Any, **kwargs: Any) -> Any:
            before, self._now = self._now, then
            try:
                return call(*args, **kwargs)
            finally:
                self._now = before

        return again
