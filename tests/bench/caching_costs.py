"""What MagCache costs a step that is computed, and a run, and what it holds.

Times are processor time on one thread, which other programs on the machine leave alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import host  # noqa: F401  first, it sets ComfyUI up
from subjects import Subject, demo, large, one_thread, ours

from comfy_extras.nodes_easycache import EasyCacheNode  # isort: skip
from adapter_lab.nodes.host.caching import Session
from pairs import say

NOTHING = 1e-9  # a threshold that no error is below
PAIRS, FEW = 7, 8  # of runs, and steps of the shorter ones: with fewer nothing is hooked
Measure = Callable[..., None]


def _models(subject: Subject, level: str, beside: str) -> tuple[Any, Any]:
    """Ours, which computes every step, and what it is measured beside."""
    rival = EasyCacheNode.execute(subject.model, 0.0, 0.0, 1.0, False).result[0]
    mine = ours(subject.model, threshold=NOTHING, residual=level)
    return mine, {"plain": subject.model, "EasyCache": rival}[beside]


def _step(make: Callable[[], Subject], level: str, beside: str) -> Callable[[Measure], None]:
    """Of a computed step: what more of them cost, so that what a run costs once drops out."""

    def bench(measure: Measure) -> None:
        subject = make()

        def step(model: Any) -> float:
            return (_spent(subject, model, 2 * FEW) - _spent(subject, model, FEW)) / FEW

        with one_thread():
            runs = [lambda model=model: step(model) for model in _models(subject, level, beside)]
            measure(*runs, beside, "ms a computed step", PAIRS)

    return bench


def _start(measure: Measure) -> None:
    """What a run costs once."""
    with one_thread():
        subject = demo()

        def once(model: Any) -> float:
            return 2 * _spent(subject, model, FEW) - _spent(subject, model, 2 * FEW)

        both = _models(subject, "blocks", "plain")
        runs = [lambda model=model: once(model) for model in both]
        measure(*runs, "plain", "ms a run", PAIRS)


def _spent(subject: Subject, model: Any, steps: int) -> float:
    """Milliseconds of processor time."""
    before, start = subject.computed, time.process_time()
    subject.sample(model, 0, steps, 1.0, 1)
    spent = time.process_time() - start
    assert subject.computed - before == steps, "a step was skipped"
    return 1000 * spent


def _held(level: str, fill: str) -> Callable[[Measure], None]:
    def bench(measure: Measure) -> None:
        seen: list[float] = []
        close = Session.close

        def watch(session: Any, *how: Any, **more: Any) -> None:
            seen.append(_bytes(session) / len(session.branches.of))
            close(session, *how, **more)

        model = ours(demo().model, residual=level, fill=fill, threshold=0.1)
        for _ in range(2):  # the first may calibrate
            with patch.object(Session, "close", watch):
                demo().sample(model, 0)
        one = _one_residual(level)
        line = {"name": f"magcache_memory_{level}_{fill.replace(' ', '_')}", "ours": seen[-1],
                "peer": one, "peer_name": "one residual", "unit": "bytes a branch",
                "ratio": round(seen[-1] / one, 4)}  # fmt: skip
        say(line)

    return bench


def _bytes(session: Any) -> float:
    """Of all that a run holds; what two share counts once."""
    points = (point for one in session.branches.of.values() for point in one.trace.points)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage() for _, parts in points
            for part in parts}  # fmt: skip
    return sum(storage.nbytes() for storage in held.values())


def _one_residual(level: str) -> int:
    """float32: the latent, or its patches of 2 x 2 at the width of the blocks."""
    batch, channels, height, width = demo().shape
    network = demo().model.model.diffusion_model
    blocks = (height // 2) * (width // 2) * network.hidden_size
    return 4 * batch * (blocks if level == "blocks" else channels * height * width)


BENCHES = {
    "magcache_start": _start,
    **{f"magcache_step_{size}_{level}_{beside.lower()}": _step(make, level, beside)
       for size, make in (("demo", demo), ("40ms", large))
       for level in ("blocks", "network") for beside in ("plain", "EasyCache")},
    **{f"magcache_memory_{level}_{fill.replace(' ', '_')}": _held(level, fill)
       for level in ("blocks", "network") for fill in ("reuse", "first order")},
}  # fmt: skip
