"""One conditioning in one place on its way through a run: what is known, what is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .magcache import Course
from .trace import Trace

_linalg: Any = torch.linalg  # has no types
_LEAST = 1e-12  # norm that something can be relative to
# Steps back at which a sampler starts again. Heun++ goes back one within its steps, and ancestral
# samplers add one step's worth of noise at each: their residuals go on. More is another picture.
_RESTART = 1.5


@dataclass
class Branch:
    """State of a conditioning: its residuals, its place in the schedule and the last decision.

    Attributes:
        name: "cond" or "uncond", whose ratios hold.
        of: the conditioning and its place, the same for every way of evaluating it.
        course: None until the ratios are known.
        sigma: where it was last; of two that are one place in the schedule the first.
        position: that in steps of the schedule, -1 before the first.
        skip: what was decided there; a second evaluation there repeats it.
        reason: why it was computed there, "" where it was skipped.
        seen: when it was last evaluated, by the count of noise levels of the run.
        input: of the network where it was last computed; kept where a guard compares it.
    """

    name: str
    trace: Trace = field(default_factory=Trace)
    course: Course | None = None
    sigma: float = math.inf
    position: float = -1.0
    skip: bool = False
    reason: str = ""
    seen: int = 0
    input: Tensor | None = None
    of: Any = None

    def wants(self, sigma: float, position: float) -> bool:
        """Go to ``sigma``, ``position`` of the schedule; whether it may be skipped there.

        A step back is computed; one that is a restart also forgets all residuals.
        """
        if position == self.position:
            return self.skip
        if self.position - position > _RESTART:
            self.forget()
        self.sigma, self.position = sigma, position
        self.reason = "nothing known" if position >= 1 else "retention"  # by any rule
        if self.course is None:
            return False
        wanted = self.course.wants(position)
        self.reason = self.course.reason
        if wanted and not self.trace.points:
            self.reason, wanted = "nothing known", False
        return wanted

    def decided(self, skip: bool, reason: str = "") -> None:
        """What became of it; ``reason``: of whoever else refused the skip."""
        self.reason = "" if skip else self.reason or reason
        self.skip = skip
        if not skip and self.course is not None:
            self.course.computed()

    def forget(self) -> None:
        """The sampler starts again: what was computed before is of no use."""
        self.trace, self.input = Trace(self.trace.length), None
        if self.course is not None:
            self.course.restart()

    def change(self, now: Tensor) -> float:
        """How far the network's input is from that of the last computed step, relative to it."""
        before = self.input
        if before is None or before.shape != now.shape:
            return math.inf
        before = before.to(now.device, now.dtype)
        return float(_norm(now - before) / _norm(before).clamp_min(_LEAST))


def _norm(tensor: Tensor) -> Tensor:
    """In float32: that of a long video is beyond float16."""
    return _linalg.vector_norm(tensor, dtype=torch.float32)
