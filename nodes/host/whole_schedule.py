"""Of which schedule the sigmas of a run are a part."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import comfy.samplers
import numpy as np

from ...core.cache.timeline import SAME, Timeline, falling, placed

Schedule = Callable[[int], list[float]]  # steps -> sigmas, strictly falling, with the last one
_USUAL = 256  # steps of a schedule that is looked for first
_MOST = 600  # and of one that is looked for at all
_COARSE = (32, 128, 512)  # steps by which schedulers are compared with a run
_UNEVEN = 1.0  # how much the steps of a run may differ in a schedule that they are taken from
_FEW = 8  # steps from all noise to none that are a schedule of their own, such as a turbo model's
_EVEN = 0.3  # and those that are from a schedule of about as many steps
_ROUNDS = 4  # of finding the number of steps of a scheduler that fits best
_WORK = 10000  # steps of all schedules that are made to find the one
_EXACT = 2e-6  # relative: what is left of a sigma after float32
_FAILS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_DROPPING = ("sample_dpm_2", "sample_dpm_2_ancestral", "sample_unipc", "sample_unipc_bh2")


def whole(sigmas: Sequence[float], model_sampling: Any, sampler: Any = None) -> Timeline:
    """The schedule of which a run does ``sigmas``, the last one included.

    Exact where a scheduler of ComfyUI has it: with a denoise below 1, start and end steps, split
    sigmas, and without the last sigma but one, as KSampler has it for some samplers. Else a run
    from all noise to none is all of its schedule, and any other is continued at both ends in even
    shares of the model's timesteps. ``Timeline.how`` says which.

    Args:
        model_sampling: of ComfyUI, with the shift of the model.
        sampler: of ComfyUI; tells whether KSampler would drop the last sigma but one.
    """
    part, given = falling(sigmas), Timeline.whole(sigmas)
    ups_and_downs = any(a < b for a, b in zip(sigmas, sigmas[1:], strict=False))
    if ups_and_downs or len(part) < 2 or part[1] == 0:
        return given
    sampling = _on_cpu(model_sampling)
    full = part[0] >= float(sampling.sigma_max) * (1 - SAME) and part[-1] == 0
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    found = _found(part, _schedules(sampling), full, name in _DROPPING)
    return found or (given if full else _continued(part, sampling))


def limits(model_sampling: Any, start: float, end: float) -> tuple[float, float]:
    """The sigmas of two shares of sampling, 0 to 1, as other nodes of ComfyUI have them."""
    highest = math.inf if start <= 0 else float(model_sampling.percent_to_sigma(start))
    return highest, 0.0 if end >= 1 else float(model_sampling.percent_to_sigma(end))


def _on_cpu(sampling: Any) -> Any:
    """A sampling whose numbers are read one by one, as schedulers do, without waiting for them."""
    return sampling if sampling.sigmas.device.type == "cpu" else copy.deepcopy(sampling).cpu()


def _schedules(sampling: Any) -> dict[str, Schedule]:
    """All of ComfyUI's schedulers, those of other nodes included.

    They give [] where they fail, and when all together have made ``_WORK`` steps.
    """
    known: dict[tuple[str, int], list[float]] = {}

    def sigmas(name: str, steps: int) -> list[float]:
        if (name, steps) not in known:
            if sum(n for _, n in known) > _WORK:
                return []
            try:
                made = comfy.samplers.calculate_sigmas(sampling, name, steps)
                known[name, steps] = falling(made.tolist())
            except _FAILS:
                known[name, steps] = []
        return known[name, steps]

    return {name: partial(sigmas, name) for name in comfy.samplers.SCHEDULER_NAMES}


def _found(
    part: list[float], schedules: dict[str, Schedule], full: bool, drops: bool
) -> Timeline | None:
    """The schedule of ComfyUI that has ``part``, one of the same length preferred."""
    steps, found = len(part) - 1, _Found(part, drops)
    if full:
        for n, (name, schedule) in product((steps, steps + 1, steps - 1), schedules.items()):
            if found.tried(name, schedule(n), complete=True):
                return found.best
        if found.best is not None or steps < _FEW:
            return found.best
    for far in (False, True):
        for fit, name in _ranked(part, schedules, far):
            for n in _near(fit, steps):
                if found.tried(name, schedules[name](n)):
                    return found.settled(schedules, n)
    return found.best


class _Found:
    """The schedule nearest to ``part`` among those that were tried, with it and without its last
    sigma but one.

    Args:
        drops: the form without it is the likelier one.
    """

    def __init__(self, part: list[float], drops: bool) -> None:
        self.part, self.drops = part, drops
        self.best: Timeline | None = None
        self.off = (math.inf, True, True, 0)

    def tried(self, name: str, full: list[float], complete: bool = False) -> bool:
        """Whether ``part`` is, to the last bits, in the schedule; of its length if ``complete``."""
        exact = False
        for form in (full, full[:-2] + full[-1:]):
            made = placed(self.part, form, f"{name}, {len(form) - 1} steps")
            if made is None or (complete and (made.cut or made.steps != len(self.part) - 1)):
                continue
            pairs = zip(self.part, form[made.start : made.stop], strict=False)
            off = max(_EXACT, *(abs(a / b - 1) for a, b in pairs))
            exact |= off == _EXACT
            key = off, made.cut, (form is full) == self.drops, _odd(made.steps)
            if key < self.off:
                self.best, self.off = made, key
        return exact

    def settled(self, schedules: dict[str, Schedule], n: int) -> Timeline | None:
        """The likeliest of several that are equal where ``part`` is: normal with 20 steps and
        sgm_uniform with 19 differ in their ends only."""
        if self.off[-1]:
            for name, schedule in schedules.items():
                for other in (n - 1, n + 1):
                    self.tried(name, schedule(other))
        return self.best


def _odd(steps: int) -> int:
    """Few people ask for 19 steps."""
    return 0 if steps % 5 == 0 else 1 + steps % 2


class _Fit(NamedTuple):
    """How ``part`` lies in a schedule of some number of steps.

    Attributes:
        beside: how far from the schedule's steps at most, in steps.
        uneven: how much its widths differ, as a share of their mean.
        steps: as many the schedule would have if they were all 1.
    """

    beside: float
    uneven: float
    steps: int


def _fit(part: list[float], schedule: Schedule, n: int) -> _Fit | None:
    """In the schedule of n; None where most of ``part`` is below its last."""
    logs, full = _logs(part), _logs(schedule(n))
    inner = [s for s in logs if full and full[-1] - SAME <= s]
    if len(inner) < max(2, len(logs) / 2):
        return None
    places = np.interp(-np.array(inner), -np.array(full), np.arange(len(full)))
    widths = np.diff(places)
    if widths.mean() <= 0:
        return None
    beside = float(np.abs(places - np.round(places)).max())
    return _Fit(beside, float(np.ptp(widths) / widths.mean()), round(n / widths.mean()))


def _near(fit: _Fit, steps: int) -> list[int]:
    """Numbers of steps that the schedule may have of which a run does ``steps``, likeliest first.

    A scheduler that takes its sigmas from a table misses each by up to one of its rows.
    """
    reach = min(2 + round(fit.uneven * fit.steps / steps), 16)
    around = range(max(1, fit.steps - reach), fit.steps + reach + 1)
    return sorted(around, key=lambda n: (reach < 8 and n != fit.steps, _odd(n), abs(n - fit.steps)))


def _ranked(part: list[float], schedules: dict[str, Schedule], far: bool) -> list[tuple[_Fit, str]]:
    """The schedulers that ``part`` may be from, the likeliest first.

    Args:
        far: those in which its steps are very small, instead of all others.
    """
    made: list[tuple[_Fit, str]] = []
    for name, schedule in schedules.items():
        coarse = _fit(part, schedule, _COARSE[0])
        small = coarse is None or coarse.steps > _USUAL
        if small != far or (coarse is not None and coarse.uneven > _UNEVEN):
            continue
        for start in _COARSE[1:] if coarse is None else [coarse.steps]:
            fit = _refined(part, schedule, start, _MOST if far else _USUAL)
            if fit is not None and fit.uneven < _EVEN + 2 * fit.steps / 1000:
                made.append((fit, name))
                break
    return sorted(made)


def _refined(part: list[float], schedule: Schedule, n: int, most: int) -> _Fit | None:
    """The fit in the schedule that has as many steps as it says, looked for from n to ``most``."""
    fit = None
    for _ in range(_ROUNDS):
        now = _fit(part, schedule, n) if 0 < n <= most else None
        if now is None or now.steps == n:
            return now
        fit, n = now, now.steps
    return fit if n <= most else None


def _logs(sigmas: Sequence[float]) -> list[float]:
    return [math.log(s) for s in sigmas if s > 0]


def _continued(part: list[float], sampling: Any) -> Timeline:
    """``part`` with steps before and after it that have the same share of the timesteps each."""
    first, last = _percent(part[0], sampling), _percent(part[-1], sampling)
    width = max((last - first) / (len(part) - 1), 1 / 1000)
    before, after = round(first / width), round((1 - last) / width) if part[-1] > 0 else 0
    earlier = [_sigma(first * i / before, sampling) for i in range(before)]
    later = [_sigma(last + (1 - last) * i / after, sampling) for i in range(1, after)]
    inner = part[:-1] if part[-1] == 0 else part
    levels = falling([*earlier, *inner, *later, 0.0])
    start = levels.index(part[0])
    stop = start + len(part) - 1
    how = "continued in even shares of the model's timesteps: no scheduler of ComfyUI has it"
    return Timeline(tuple(levels[:-1]), start, stop, how)


def _sigma(percent: float, sampling: Any) -> float:
    """At a share of sampling; all noise is the model's maximum."""
    return float(sampling.percent_to_sigma(percent) if percent > 0 else sampling.sigma_max)


def _percent(sigma: float, sampling: Any) -> float:
    """The share of sampling at which there is this noise, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigma(middle, sampling) > sigma else (low, middle)
    return (low + high) / 2
