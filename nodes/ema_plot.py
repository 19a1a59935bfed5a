"""The picture of an average of checkpoints: weights, decays, and widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.merge.ema import Plan
from ..core.power import WIDEST, density, musubi_weights, weights, width
from .plots import BACK, DOTS, FAINT, GRID, INK, LINE, as_tensor

_PANEL, _MARGIN = (640, 360), (64, 54, 24, 48)  # left, top, right, bottom
_COLOURS = (LINE, DOTS, "#a3be8c", "#b48ead", "#d08770")
_WIDTHS = (0.05, 0.10, 0.15, 0.20, 0.25)
_COUNTS = (5, 10, 20, 50)  # of files
_POINTS = 300  # of a curve
Points = Sequence[tuple[float, float]]


@dataclass
class _Chart:
    """Axes in one corner of the picture."""

    draw: ImageDraw.ImageDraw
    origin: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the axes."""
        (x, y), (left, top, right, bottom) = self.origin, _MARGIN
        return x + left, y + top, x + _PANEL[0] - right, y + _PANEL[1] - bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point; what is above or below the axes lies on their edge."""
        left, top, right, bottom = self.box
        px = left + (right - left) * (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        py = bottom - (bottom - top) * (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return px, min(max(py, top), bottom)

    def axes(self, title: str, label: str, whole: bool = True) -> None:
        """Title, label of the x axis, grid and numbers; ``whole``: only whole numbers on it."""
        left, top, right, bottom = self.box
        font = ImageFont.load_default(12)
        step = _round_step((self.y[1] - self.y[0]) / 5)
        level = math.ceil(self.y[0] / step - 1e-9) * step
        while level <= self.y[1] + 1e-9:
            y = self.at(self.x[0], level)[1]
            colour = FAINT if abs(level) < 1e-12 else GRID
            self.draw.line([(left, y), (right, y)], fill=colour)
            shown = f"{0.0 if abs(level) < 1e-12 else level:.3g}"
            self.draw.text((left - 6, y), shown, fill=INK, anchor="rm", font=font)
            level += step
        for tick in _ticks(*self.x, whole):
            px = self.at(tick, self.y[0])[0]
            self.draw.line([(px, bottom), (px, bottom + 4)], fill=FAINT)
            self.draw.text((px, bottom + 7), f"{tick:g}", fill=INK, anchor="mt", font=font)
        self.draw.text((left, self.origin[1] + 10), title, fill=INK, anchor="lt",
                       font=ImageFont.load_default(14))  # fmt: skip
        self.draw.text(((left + right) / 2, bottom + 26), label, fill=INK, anchor="mt", font=font)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """(text, colour) in a row below the title."""
        font, x = ImageFont.load_default(12), float(self.box[0])
        y = self.origin[1] + 38
        for text, colour in entries:
            self.draw.line([(x, y), (x + 14, y)], fill=colour, width=3)
            self.draw.text((x + 18, y), text, fill=INK, anchor="lm", font=font)
            x += 18 + font.getlength(text) + 14

    def curve(self, points: Points, colour: str, thick: int = 2) -> None:
        """A line through ``points``."""
        if len(points) > 1:
            self.draw.line([self.at(*p) for p in points], fill=colour, width=thick, joint="curve")

    def dots(self, points: Points, colour: str, radius: float = 3) -> None:
        """A disc at each of ``points``."""
        for point in points:
            x, y = self.at(*point)
            self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def average_plot(made: Plan) -> Tensor:
    """Weights and decays of ``made`` and what widths and decays mean, as an IMAGE,
    (1, 720, 1280, 3) in [0, 1]."""
    image = Image.new("RGB", (2 * _PANEL[0], 2 * _PANEL[1]), BACK)
    draw = ImageDraw.Draw(image)
    _weights(draw, made)
    (_profiles if made.error is not None else _decays)(draw, made)
    _decays_of_widths(draw, made)
    _widths_of_decays(draw, made)
    return as_tensor(image)


def _weights(draw: ImageDraw.ImageDraw, made: Plan) -> None:
    """A stem for each file; tracked averages of each width in a colour."""
    times, found = made.course.times, [float(w) for w in made.weights]
    kinds = list(dict.fromkeys(c.sigma_rel for c in made.files))
    colours = dict(zip(kinds, _COLOURS * (1 + len(kinds) // len(_COLOURS)), strict=False))
    low, high = min(0.0, *found), max(0.0, *found)
    chart = _Chart(draw, (0, 0), _span(times), (low * 1.1, high * 1.1 or 1.0))
    chart.axes("weight of each checkpoint", made.course.unit)
    for one, time, weight in zip(made.files, times, found, strict=True):
        colour = colours[one.sigma_rel]
        # Averages of several widths stand side by side at one step.
        aside = 4 * (kinds.index(one.sigma_rel) - (len(kinds) - 1) / 2)
        (x, zero), (_, y) = chart.at(time, 0), chart.at(time, weight)
        draw.line([(x + aside, zero), (x + aside, y)], fill=colour, width=2)
        draw.ellipse([x + aside - 3, y - 3, x + aside + 3, y + 3], fill=colour)
    if made.error is not None:
        chart.legend([(f"tracked average {kind:.2f}", colours[kind]) for kind in kinds if kind])


def _profiles(draw: ImageDraw.ImageDraw, made: Plan) -> None:
    """What every step of the training weighs: as wanted, and as the snapshots give it."""
    end, wanted = float(made.end), made.settings.sigma_rel
    at = np.linspace(end / _POINTS, end, _POINTS)
    ideal = density([(end, wanted)], [1.0], at) * end
    reached = density(made.snapshots, list(made.weights), at) * end
    low, high = min(0.0, float(reached.min())), max(float(ideal.max()), float(reached.max()))
    chart = _Chart(draw, (_PANEL[0], 0), (0.0, end), (low * 1.1, high * 1.1))
    chart.axes("weight of each step of the training, relative to their mean", made.course.unit)
    steps = at.tolist()
    chart.curve([*zip(steps, ideal.tolist(), strict=True)], DOTS, 5)
    chart.curve([*zip(steps, reached.tolist(), strict=True)], LINE, 2)
    chart.legend([(f"wanted, sigma_rel {wanted:g}", DOTS),
                  (f"reached, off by {made.error or 0.0:.2%}", LINE)])  # fmt: skip


def _decays(draw: ImageDraw.ImageDraw, made: Plan) -> None:
    """How much of the average each next file keeps."""
    times = made.course.times
    chart = _Chart(draw, (_PANEL[0], 0), _span(times), (0.0, 1.0))
    chart.axes("beta: what the average keeps when a checkpoint is added", made.course.unit)
    points = [*zip(times[1:], made.betas, strict=True)]
    chart.curve(points, LINE)
    chart.dots(points, LINE)


def _decays_of_widths(draw: ImageDraw.ImageDraw, made: Plan) -> None:
    """Equal to a width: the beta at each of as many equally spaced checkpoints."""
    count = max(10, len(set(made.course.times)))
    chart = _Chart(draw, (0, _PANEL[1]), (1.0, float(count)), (0.0, 1.0))
    chart.axes(
        "beta over the epochs that keeps a width sigma_rel",
        "epoch, or checkpoint saved at equal distances",
    )
    own = made.settings.sigma_rel if made.profile in ("reconstruct", "power", "musubi power") else 0
    chosen = next((s for s in _WIDTHS if math.isclose(s, own)), own)
    shown = sorted({*_WIDTHS, chosen} - {0})
    colours = {
        s: _COLOURS[i % len(_COLOURS)] for i, s in enumerate(s for s in shown if s in _WIDTHS)
    }
    for value in shown:
        sums = np.cumsum(weights(range(1, count + 1), value))
        points = [(k + 2.0, float(sums[k] / sums[k + 1])) for k in range(count - 1)]
        chart.curve(points, colours.get(value, INK), 4 if value == chosen else 2)
    texts = [f"{value:g}" + (" (chosen)" if value == chosen else "") for value in shown]
    texts[0] = f"sigma_rel {texts[0]}"
    chart.legend([(t, colours.get(v, INK)) for t, v in zip(texts, shown, strict=True)])


def _widths_of_decays(draw: ImageDraw.ImageDraw, made: Plan) -> None:
    """The width of the weights that a constant beta leads to."""
    count = len(set(made.course.times))
    shown = sorted({*_COUNTS, count})
    betas = np.linspace(0, 1, _POINTS)
    chart = _Chart(draw, (_PANEL[0], _PANEL[1]), (0.0, 1.0), (0.0, 0.4))
    chart.axes("width sigma_rel that a constant beta gives", "beta", whole=False)
    chart.curve([(0.0, WIDEST), (1.0, WIDEST)], FAINT, 1)
    x, y = chart.at(0.01, WIDEST)
    draw.text((x, y + 5), "0.2886, the plain mean of all files", fill=INK, anchor="lt",
              font=ImageFont.load_default(12))  # fmt: skip
    colours = dict(zip((n for n in shown if n in _COUNTS), _COLOURS, strict=False))
    for n in shown:
        found = [(float(b), width(range(1, n + 1), list(musubi_weights(n, float(b)))))
                 for b in betas]  # fmt: skip
        chart.curve(found, colours.get(n, INK), 4 if n == count else 2)
    entries = [(f"{n} files" + (" (these)" if n == count else ""), colours.get(n, INK))
               for n in shown]  # fmt: skip
    if made.profile == "musubi beta" and made.settings.beta2 is None:
        beta = made.settings.beta
        even = width(range(1, count + 1), list(musubi_weights(count, beta)))
        chart.dots([(beta, even)], INK, 5)
        entries.append((f"beta {beta:g}: {even:.3f}", INK))
    chart.legend(entries)


def _span(times: Sequence[int]) -> tuple[float, float]:
    """The range of an x axis with some room at both ends."""
    room = 0.04 * (times[-1] - times[0]) or 0.5
    return times[0] - room, times[-1] + room


def _round_step(step: float) -> float:
    """The next round number from ``step`` up."""
    unit = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(n * unit for n in (1, 2, 2.5, 5, 10) if n * unit >= step * (1 - 1e-9))


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    step = _round_step((high - low) / 6)
    step = max(1.0, float(math.ceil(step))) if whole else step
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
