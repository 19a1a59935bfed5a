"""Interleaved measurement of ours and a peer's."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

Run = Callable[[], float]


def measure(name: str, ours: Run, peer: Run, peer_name: str, unit: str, pairs: int) -> None:
    """Interleave ``pairs`` of both (each gives its figure) after one unmeasured pair."""
    ours(), peer()
    figures = [(ours(), peer()) for _ in range(pairs)]
    mine, theirs = (statistics.median(column) for column in zip(*figures, strict=True))
    line = {
        "name": name, "ours": round(mine, 6), "peer": round(theirs, 6), "peer_name": peer_name,
        "unit": unit, "ratio": round(mine / theirs, 4), "pairs": pairs,
    }  # fmt: skip
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], object]) -> Run:
    """Seconds that ``work`` takes."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run
