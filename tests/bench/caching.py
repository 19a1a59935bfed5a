"""Skipping steps of the demo model: error against speed, beside ComfyUI's EasyCache and LazyCache.

Every run samples plainly and with each setting in turn, so that all see the same machine. A
speed-up is the median over the runs, of whole sampling calls; errors are over all pictures
together: of the latents relative L2, of the decoded pictures PSNR.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import host  # noqa: F401  first, it sets ComfyUI up
import torch
from curve_picture import draw
from pairs import say
from subjects import BATCH, CFG, ROOT, STEPS, Subject, decoded, demo, one_thread, ours
from torch import Tensor

from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode  # isort: skip

PICTURE = ROOT / "web/docs/AdapterLabMagCache/curve.png"
PICTURES = 32
SEEDS = range(PICTURES // BATCH)  # of the runs, each with a prompt of its own
# Ours as it is, on the residual of the whole network, by the error of magnitudes alone, and as the
# reference does; at so many computed steps, which thresholds are found for.
OURS, WHOLE, BY_RATIO, REUSE = "MagCache", "network level", "magnitude error", "reuse"
FILLED = {
    OURS: ((20, 18, 16, 14, 12), {}),
    WHOLE: ((20, 18, 16, 14, 12), {"residual": "network"}),
    BY_RATIO: ((20, 18, 16, 14, 12), {"errors": "magnitude"}),
    REUSE: ((18, 14, 12), {"fill": "reuse"}),
}  # fmt: skip
EASY, LAZY = "EasyCache", "LazyCache"
RATES = {EASY: (0.02, 0.05, 0.1, 0.2), LAZY: (0.02, 0.05, 0.1, 0.2)}
ASKED = {14: 42.0, 18: 49.0}  # dB at so many computed steps
FINEST = 1e-3  # of thresholds, as far apart as people set them
Measure = Callable[..., None]


@dataclass
class Variant:
    """One way to skip, and what came of it, a value a picture."""

    method: str
    setting: float
    model: Any
    latents: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def run(self, subject: Subject, seed: int) -> None:
        before, start = subject.computed, time.perf_counter()
        self.latents.append(subject.sample(self.model, seed))
        self.seconds.append(time.perf_counter() - start)
        self.computed.append(subject.computed - before)

    def line(self, plain: Variant, decode: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Any]:
        """What is printed of it, beside ``plain``."""
        mine, theirs = torch.cat(self.latents), torch.cat(plain.latents)
        pairs = zip(plain.seconds, self.seconds, strict=True)
        error = (decode(self.latents) - decode(plain.latents)).square().mean()
        return {
            "name": "magcache", "method": self.method, "setting": round(self.setting, 4),
            "computed": round(statistics.mean(self.computed), 1), "steps": STEPS, "cfg": CFG,
            "speed_up": round(statistics.median(a / b for a, b in pairs), 3),
            "relative_l2": round(float((mine - theirs).norm() / theirs.norm()), 5),
            "psnr": round(-10 * math.log10(max(float(error), 1e-12)), 2), "pictures": PICTURES,
        }  # fmt: skip


def _threshold(computed: int, settings: Mapping[str, Any]) -> float:
    """Of our node, at which a run computes ``computed`` steps, or the fewest above."""
    subject, low, high = demo(), 0.0, 4.0
    while high - low > FINEST:
        middle, before = (low + high) / 2, subject.computed
        subject.sample(ours(subject.model, threshold=middle, **settings), SEEDS[0], batch=1)
        made = subject.computed - before
        if made == computed:
            return middle
        low, high = (middle, high) if made > computed else (low, middle)
    return low


def variants() -> list[Variant]:
    """All that is compared, the plain model first."""
    model = demo().model
    for level in ("blocks", "network"):  # calibrates, on a picture that is not compared
        demo().sample(ours(model, residual=level), len(SEEDS), batch=1)
    made = [Variant("plain", 0.0, model)]
    for method, (counts, settings) in FILLED.items():
        for count in counts:
            threshold = _threshold(count, settings)
            made.append(Variant(method, threshold, ours(model, threshold=threshold, **settings)))
    for method, node in ((EASY, EasyCacheNode), (LAZY, LazyCacheNode)):
        for rate in RATES[method]:
            hooked = node.execute(model, rate, 0.15, 0.95, False).result[0]
            made.append(Variant(method, rate, hooked))
    return made


@cache
def _lines() -> list[dict[str, Any]]:
    with one_thread():
        plain, *others = variants()
        for seed in SEEDS:
            for variant in (plain, *others):
                variant.run(demo(), seed)
        return [variant.line(plain, decoded) for variant in others]


def _curve(measure: Measure) -> None:
    lines = _lines()
    for line in lines:
        say(line)
    for computed, asked in ASKED.items():
        for method in (OURS, WHOLE, BY_RATIO):
            there = [x for x in lines if x["method"] == method and x["computed"] <= computed]
            best = max((line["psnr"] for line in there), default=None)
            say(_beside(f"magcache_{computed}_of_{STEPS}", method, best, asked, "asked for"))
    for method in (OURS, WHOLE, BY_RATIO):
        curve = sorted(
            (line["speed_up"], line["psnr"]) for line in lines if line["method"] == method
        )
        for line in (line for line in lines if line["method"] in RATES):
            name, peer = (
                f"magcache_at_{line['speed_up']:.2f}x",
                f"{line['method']} {line['setting']}",
            )
            say(_beside(name, method, _at(curve, line["speed_up"]), line["psnr"], peer))


def _beside(name: str, of: str, mine: float | None, theirs: float, peer: str) -> dict[str, object]:
    """A line of PSNR; None for what no threshold of ours reaches."""
    above = None if mine is None else round(mine - theirs, 2)
    return {"name": name, "of": of, "ours": mine, "peer": theirs, "peer_name": peer, "unit": "dB",
            "above": above}  # fmt: skip


def _at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The best PSNR at a speed-up of ``x`` or more: between two points on the line through them."""
    faster = [y for speed, y in curve if speed >= x]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 < x <= x1:
            faster.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return round(max(faster), 2) if faster else None


def _picture(measure: Measure) -> None:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for line in _lines():
        point = line["speed_up"], line["psnr"], line["computed"]
        curves.setdefault(line["method"], []).append(point)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, f"demo model, {STEPS} steps, {PICTURES} pictures").save(PICTURE, optimize=True)
    say({"name": "magcache_picture", "written": str(PICTURE.relative_to(ROOT))})


BENCHES = {"magcache": _curve, "magcache_picture": _picture}
LONG = set(BENCHES)
