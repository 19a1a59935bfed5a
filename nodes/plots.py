"""Pictures of curves, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE, MARGIN = (640, 360), (56, 20, 16, 40)
BACK, INK, GRID, FAINT = "#242933", "#d8dee9", "#3b4252", "#4c6a92"
LINE, DOTS = "#88c0d0", "#ebcb8b"


def loss_plot(losses: Sequence[float], validation: Sequence[tuple[int, float]]) -> Tensor:
    """Training loss and held-out loss against the step as an IMAGE, (1, h, w, 3) in [0, 1].

    The training loss is drawn faintly, its running mean strongly: single batches scatter by more
    than a whole run improves. Losses that are not finite are left out.
    """
    known = [point for point in enumerate(losses, 1) if math.isfinite(point[1])]
    validation = [point for point in validation if math.isfinite(point[1])]
    image, draw = _canvas()
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    means = _running_mean([loss for _, loss in known])
    smooth = [(step, mean) for (step, _), mean in zip(known, means, strict=True)]
    # The range of what is to be read; outliers of single batches may leave the picture.
    shown = [loss for _, loss in (*smooth, *validation)] or [0.0, 1.0]
    pad = 0.15 * (max(shown) - min(shown)) or 0.1 * abs(shown[0]) or 1.0
    low, high = max(min(shown) - pad, 0.0), max(shown) + pad
    steps = max(len(losses), 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / steps
        y = bottom - (bottom - top) * (loss - low) / (high - low)
        return x, min(max(y, top), bottom)

    font = ImageFont.load_default(12)
    _grid(draw, top, [f"{low + (high - low) * i / 4:.3g}" for i in range(5)])
    for step in (round(steps * i / 4) for i in range(5)):
        draw.text((at(step, low)[0], bottom + 8), str(step), fill=INK, anchor="mt", font=font)
    for values, colour, width in ((known, FAINT, 1), (smooth, LINE, 2)):
        points = [at(step, loss) for step, loss in values]
        if len(points) > 1:
            draw.line(points, fill=colour, width=width, joint="curve")
    marks = [at(step, loss) for step, loss in validation]
    if len(marks) > 1:
        draw.line(marks, fill=DOTS, width=2)
    for x, y in marks:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=DOTS)
    draw.text((left, SIZE[1] - 10), "training loss (mean)", fill=LINE, anchor="ls", font=font)
    if validation:
        draw.text((left + 150, SIZE[1] - 10), "held-out loss", fill=DOTS, anchor="ls", font=font)
    return as_tensor(image)


def block_plot(norms: Sequence[tuple[str, float]]) -> Tensor:
    """Norm of the change by block as an IMAGE, (1, h, w, 3) in [0, 1].

    Args:
        norms: (block, norm) in the order of the model; runs of blocks that differ only in their
            number ("double_blocks.0", "double_blocks.1") share a colour and a caption.
    """
    norms = [("".join(c if c.isprintable() else "?" for c in name), n) for name, n in norms]
    image, draw = _canvas()
    left, top, right, bottom = MARGIN[0], MARGIN[1] + 14, SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    font, small = ImageFont.load_default(12), ImageFont.load_default(10)
    tick = _tick(max((norm for _, norm in norms), default=0.0))
    _grid(draw, top, [f"{tick * i:g}" for i in range(5)])
    draw.text((left, 8), "norm of the change by block", fill=INK, anchor="lt", font=font)
    runs = _runs(norms)
    # A gap of one bar between two runs.
    step = min((right - left) / max(len(norms) + len(runs) - 1, 1), 96)
    x = free = left
    for colour, (kind, blocks) in zip(cycle((LINE, DOTS)), runs, strict=False):
        start = min(max(x, free), right - font.getlength(kind))
        if start >= free:
            draw.text((start, bottom + 20), kind, fill=colour, anchor="lt", font=font)
            free = start + font.getlength(kind) + 8
        for i, (number, norm) in enumerate(blocks):
            high = (bottom - top) * norm / (4 * tick)
            draw.rectangle([(x, bottom - high), (x + max(step * 0.8, 1), bottom)], fill=colour)
            if i % math.ceil(16 / step) == 0:
                at = x + step * 0.4, bottom + 4
                draw.text(at, number, fill=INK, anchor="mt", font=small)
            x += step
        x += step
    return as_tensor(image)


def level_plot(levels: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    """Histogram of sampled noise levels, and the weight of the loss, (1, h, w, 3) in [0, 1].

    Args:
        levels: drawn levels in (0, 1). at, weights: the curve of the weight over the level.
    """
    image, draw = _canvas()
    left, top, right, bottom = MARGIN[0], MARGIN[1] + 14, SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    font = ImageFont.load_default(12)
    counts = torch.histc(levels.float(), bins=50, min=0.0, max=1.0)
    density = (counts * len(counts) / len(levels)).tolist()
    tick, most = _tick(max(density)), max(float(weights.max()), 1e-12)
    _grid(draw, top, [f"{tick * i:g}" for i in range(5)])
    for i in range(5):
        x = left + (right - left) * i / 4
        draw.text((x, bottom + 8), f"{i / 4:g}", fill=INK, anchor="mt", font=font)
    step = (right - left) / len(density)
    for i, value in enumerate(density):
        x, high = left + step * i, (bottom - top) * value / (4 * tick)
        draw.rectangle([(x, bottom - high), (x + step - 1, bottom)], fill=FAINT)
    curve = zip(at.tolist(), weights.tolist(), strict=True)
    points = [
        (left + (right - left) * t, bottom - (bottom - top) * 0.98 * w / most) for t, w in curve
    ]
    draw.line(points, fill=DOTS, width=2, joint="curve")
    draw.text((left, 8), "density of the noise level", fill=LINE, anchor="lt", font=font)
    legend = f"weight of the loss, at most {most:.3g}"
    draw.text((right, 8), legend, fill=DOTS, anchor="rt", font=font)
    draw.text((left, SIZE[1] - 6), "0 clean, 1 noise", fill=INK, anchor="lb", font=font)
    return as_tensor(image)


def _grid(draw: ImageDraw.ImageDraw, top: int, labels: Sequence[str]) -> None:
    """Horizontal lines at equal distances, and their labels from the lowest up."""
    left, right, bottom = MARGIN[0], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    font = ImageFont.load_default(12)
    for i, label in enumerate(labels):
        y = bottom - (bottom - top) * i / (len(labels) - 1)
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 6, y), label, fill=INK, anchor="rm", font=font)


def _tick(high: float) -> float:
    """A round number that four of reach ``high``."""
    unit = 10 ** math.floor(math.log10(high / 4)) if high > 0 else 0.25
    return next(n * unit for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if 4 * n * unit >= high)


def _runs(norms: Sequence[tuple[str, float]]) -> list[tuple[str, list[tuple[str, float]]]]:
    """(kind, its (number, norm)) of each run of blocks of one kind."""
    runs: list[tuple[str, list[tuple[str, float]]]] = []
    for block, norm in norms:
        kind, _, number = block.rpartition(".")
        kind, number = (kind, number) if number.isdecimal() else (block, "")
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append((number, norm))
    return runs


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, BACK)
    return image, ImageDraw.Draw(image)


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as an IMAGE, (1, h, w, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last 5 % of the steps before each."""
    window = max(1, len(values) // 20)
    sums = np.cumsum([0.0, *values])
    return [
        float((sums[i] - sums[max(0, i - window)]) / min(i, window))
        for i in range(1, len(values) + 1)
    ]
