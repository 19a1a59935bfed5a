"""Interleaved measurement of ours and a peer's."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
Run = Callable[[], float]


def measure(
    name: str, ours: Run, peer: Run, peer_name: str, unit: str, pairs: int, warm: bool = True
) -> None:
    """Interleave ``pairs`` of both, each of which gives its figure.

    Args:
        warm: after a pair that is not measured.
    """
    if warm:
        ours(), peer()
    figures = [(ours(), peer()) for _ in range(pairs)]
    mine, theirs = (statistics.median(column) for column in zip(*figures, strict=True))
    line = {
        "name": name, "ours": round(mine, 6), "peer": round(theirs, 6), "peer_name": peer_name,
        "unit": unit, "ratio": round(mine / theirs, 4) if theirs else None, "pairs": pairs,
    }  # fmt: skip
    say(line)


def say(line: dict[str, object]) -> None:
    """Print a line of the result."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], object]) -> Run:
    """Seconds that ``work`` takes."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def peak(work: Callable[[], object]) -> float:
    """Bytes that ``work`` holds at its peak beside what was held before, by the kernel's count."""
    gc.collect()
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
