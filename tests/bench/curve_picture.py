"""The picture of the bench of skipped steps: PSNR against speed-up, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from adapter_lab.nodes.plots import BACK, DOTS, FAINT, GRID, INK, LINE
from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN = (800, 460), (64, 72, 28, 56)  # of the picture; left, top, right, bottom
COLOURS = (LINE, "#a3be8c", "#b48ead", "#5e81ac", DOTS, "#bf616a")
X_TICK, Y_TICK = 0.25, 10
Point = tuple[float, float, float]  # speed-up, PSNR, computed steps


def draw(curves: Mapping[str, Sequence[Point]], title: str) -> Image.Image:
    """Draw ``curves``; the points of the first are captioned with their computed steps."""
    image = Image.new("RGB", SIZE, BACK)
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    points = [point for curve in curves.values() for point in curve]
    x0, x1 = 1.0, _up(max(x for x, *_ in points), X_TICK)
    y0 = Y_TICK * (min(y for _, y, _ in points) // Y_TICK)
    y1 = _up(max(y for _, y, _ in points), Y_TICK)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + (right - left) * across, bottom - (bottom - top) * up

    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    for i in range(round((y1 - y0) / Y_TICK) + 1):
        y = at(x0, y0 + i * Y_TICK)[1]
        pen.line([(left, y), (right, y)], fill=GRID)
        pen.text((left - 8, y), f"{y0 + i * Y_TICK:g}", fill=INK, anchor="rm", font=font)
    for i in range(round((x1 - x0) / X_TICK) + 1):
        x = at(x0 + i * X_TICK, y0)[0]
        pen.line([(x, bottom), (x, bottom + 4)], fill=FAINT)
        pen.text((x, bottom + 8), f"{x0 + i * X_TICK:g}x", fill=INK, anchor="mt", font=font)
    pen.text((left, 12), "PSNR in dB to the pictures without skipping", fill=INK, font=font)
    pen.text((right, 14), title, fill=INK, anchor="rt", font=small)
    pen.text(
        ((left + right) / 2, SIZE[1] - 8), "measured speed-up", fill=INK, anchor="mb", font=font
    )
    start = float(left)
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), cycle(COLOURS))):
        pen.line([(start, 52), (start + 18, 52)], fill=colour, width=3)
        pen.text((start + 24, 52), name, fill=INK, anchor="lm", font=small)
        start += 24 + small.getlength(name) + 20
        spots = [at(x, y) for x, y, _ in sorted(curve)]
        pen.line(spots, fill=colour, width=2, joint="curve")
        for (x, y), point in zip(spots, sorted(curve), strict=True):
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
            if i == 0:
                pen.text((x + 2, y - 7), f"{point[2]:g}", fill=INK, anchor="lb", font=small)
    return image


def _up(x: float, tick: float) -> float:
    return tick * -(-x // tick)
