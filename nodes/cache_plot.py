"""The picture of a MagCache schedule: which steps are skipped, and why the others are not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.cache.planned import Plan, Step
from ..core.cache.speedup import speedup
from .plots import BACK, DOTS, FAINT, GRID, INK, LINE, as_tensor

_WIDTH, _LEFT, _RIGHT = 960, 84, 24
_TOP, _ROW, _CHART, _GAP = 92, 30, 150, 62  # heights
_OVER = "#bf616a"
_COLOURS = {"cond": LINE, "uncond": DOTS}
_EMPTY = "#2e3440"
_SUMS = {
    "magnitude": "the sum of |1 - R|, R the product of its ratios",
    "extrapolation": "how far the line through two residuals is off",
}
# Letter in the strip -> why a step is computed.
_LETTERS = {
    "retention": ("R", "retention"),
    "threshold": ("E", "error at the threshold"),
    "longest run": ("K", "k skipped in a row"),
    "last step": ("L", "last step"),
    "always computed": ("A", "always computed on this model"),
    "own ratio": ("O", "own ratio too far from 1"),
}


@dataclass
class _Panel:
    """One of the stacked parts; all have the steps from left to right."""

    draw: ImageDraw.ImageDraw
    steps: int
    top: int
    bottom: int
    low: float = 0.0
    high: float = 1.0

    def x(self, t: float) -> float:
        """The left end of step ``t``."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * t / self.steps

    def y(self, value: float) -> float:
        """The height of a value; what is outside of the range lies on its edge."""
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.bottom - (self.bottom - self.top) * min(max(share, 0.0), 1.0)

    def say(self, at: tuple[float, float], text: str, colour: str = INK, anchor: str = "lt",
            size: int = 12) -> float:  # fmt: skip
        """Write; where the text ends."""
        font = ImageFont.load_default(size)
        self.draw.text(at, text, fill=colour, anchor=anchor, font=font)
        return at[0] + font.getlength(text)

    def axes(self, title: str) -> None:
        """Title, and a grid at round numbers between which the range is."""
        step = _round((self.high - self.low) / 4)
        self.low = math.floor(self.low / step + 1e-9) * step
        self.high = math.ceil(self.high / step - 1e-9) * step
        self.say((_LEFT, self.top - 24), title)
        for i in range(round((self.high - self.low) / step) + 1):
            y = self.y(self.low + step * i)
            self.draw.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], fill=GRID)
            self.say((_LEFT - 8, y), f"{self.low + step * i:.4g}", anchor="rm")
        every = math.ceil(self.steps / 25)
        for t in range(0, self.steps, every):
            self.say((self.x(t + 0.5), self.bottom + 6), str(t + 1), anchor="mt", size=11)


def _round(step: float) -> float:
    """The next round number from ``step`` up."""
    unit = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(n * unit for n in (1, 2, 2.5, 5, 10) if n * unit >= step * (1 - 1e-9))


def plan_plot(plan: Plan) -> Tensor:
    """Strip, ratios and errors of a schedule as an IMAGE, (1, h, w, 3) in [0, 1]."""
    rows = len(_decisions(plan))
    ratios = _TOP + rows * _ROW + _GAP
    errors = ratios + _CHART + _GAP
    image = Image.new("RGB", (_WIDTH, errors + _CHART + 74), BACK)
    draw = ImageDraw.Draw(image)
    _strip(_Panel(draw, plan.steps, _TOP, _TOP + rows * _ROW), plan)
    _ratios(_Panel(draw, plan.steps, ratios, ratios + _CHART), plan)
    _errors(_Panel(draw, plan.steps, errors, errors + _CHART), plan)
    return as_tensor(image)


def _strip(panel: _Panel, plan: Plan) -> None:
    """A row a branch: full where a step is computed, with the reason, empty where it is skipped."""
    count, steps = len(plan.together), plan.steps
    faster = f"{speedup(count, steps):.2f}x as fast at best"
    title = f"{steps - count} of {steps} steps computed: {faster}. {plan.name}"
    panel.say((_LEFT, 16), title, size=16)
    for row, (branch, found) in enumerate(_decisions(plan).items()):
        y = panel.top + row * _ROW
        colour = _COLOURS.get(branch, INK)
        panel.say((_LEFT - 8, y + 11), branch, colour, "rm")
        for t, reason in enumerate(found):
            _cell(panel, t, y, reason, colour)
    used = {reason for found in plan.branches.values() for step in found if (reason := step.reason)}
    known = [f"{letter} {words}" for key, (letter, words) in _LETTERS.items() if key in used]
    panel.say((_LEFT, 46), "filled: computed, empty: skipped.  " + "   ".join(known))
    panel.say((_LEFT, 64), "After a computed step a new run of skipped ones begins, with E = 0.")


def _decisions(plan: Plan) -> dict[str, list[str]]:
    """Why each step is computed, "" for a skipped one; a row for both branches if they differ."""
    made = {branch: [s.reason for s in found] for branch, found in plan.branches.items()}
    both = ["" if t in plan.together else " " for t in range(plan.steps)]
    differ = any([not why for why in found] != [not why for why in both] for found in made.values())
    return {**made, "both": both} if differ else made


def _cell(panel: _Panel, t: int, y: float, reason: str, colour: str) -> None:
    left, right = panel.x(t), panel.x(t + 1)
    gap = 1 if right - left > 4 else 0
    box = (left, y, max(left, right - 1 - gap), y + _ROW - 8)
    panel.draw.rectangle(box, fill=colour if reason else _EMPTY)
    letter = _LETTERS.get(reason, ("", ""))[0]
    if letter and right - left >= 10:
        panel.say(((left + right) / 2, y + 11), letter, BACK, "mm", 11)


def _ratios(panel: _Panel, plan: Plan) -> None:
    """How the residual's size changes at each step."""
    found = [step.own for branch in plan.branches.values() for step in branch]
    middle = sorted(found)
    # A single step at an end may change by ten times as much as the others.
    low, high = middle[len(middle) // 50], middle[-1 - len(middle) // 50]
    pad = 0.1 * (max(high, 1.0) - min(low, 1.0)) or 0.05
    panel.low, panel.high = min(low, 1.0) - pad, max(high, 1.0) + pad
    panel.axes("size of the residual by that of the step before: where it is near 1, the last one "
               "can stand in")  # fmt: skip
    panel.draw.line([(_LEFT, panel.y(1)), (_WIDTH - _RIGHT, panel.y(1))], fill=FAINT, width=2)
    for branch, steps in plan.branches.items():
        points = [(panel.x(t + 0.5), panel.y(step.own)) for t, step in enumerate(steps)]
        if len(points) > 1:
            panel.draw.line(points, fill=_COLOURS[branch], width=2)
        for x, y in points if plan.steps <= 100 else []:
            panel.draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=_COLOURS[branch])


def _errors(panel: _Panel, plan: Plan) -> None:
    """The error that decides, against the threshold."""
    threshold = plan.rule.threshold
    most = max((step.error for steps in plan.branches.values() for step in steps), default=0.0)
    panel.high = max(1.15 * min(most, 3 * threshold or most), 1.3 * threshold) or 1.0
    panel.axes(f"error E of the run of skipped steps, with this step: {_SUMS[plan.errors]}")
    share = 0.8 / len(plan.branches)
    for i, (branch, steps) in enumerate(plan.branches.items()):
        for t, step in enumerate(steps):
            _bar(panel, t + 0.1 + i * share, share, step, _COLOURS[branch])
    y = panel.y(threshold)
    panel.draw.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], fill=INK, width=1)
    panel.say((_LEFT + 4, y - 3), f"threshold {threshold:.4g}", anchor="lb")
    x = panel.say((_LEFT, panel.bottom + 34), "A bar in this colour: the step is computed, for "
                  "the reason in the strip.", _OVER)  # fmt: skip
    entries = _COLOURS.items() if len(plan.branches) > 1 else [("skipped", LINE)]
    for branch, colour in entries:
        x = panel.say((x + 18, panel.bottom + 34), branch, colour)


def _bar(panel: _Panel, at: float, width: float, step: Step, colour: str) -> None:
    """Nothing where the step is computed whatever its error."""
    if not step.error:
        return
    left, right = panel.x(at), panel.x(at + width)
    box = (left, panel.y(step.error), max(left, right - 1), panel.bottom)
    panel.draw.rectangle(box, fill=_OVER if step.reason else colour)
