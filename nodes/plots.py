"""Pictures of curves, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE, MARGIN = (640, 360), (56, 20, 16, 40)
INK, GRID, FAINT, LINE, DOTS = "#d8dee9", "#3b4252", "#4c6a92", "#88c0d0", "#ebcb8b"


def loss_plot(losses: Sequence[float], validation: Sequence[tuple[int, float]]) -> Tensor:
    """Training loss and held-out loss against the step as an IMAGE, (1, h, w, 3) in [0, 1].

    The training loss is drawn faintly, its running mean strongly: single batches scatter by more
    than a whole run improves.
    """
    image = Image.new("RGB", SIZE, "#242933")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    smooth = _running_mean(losses)
    # The range of what is to be read; outliers of single batches may leave the picture.
    shown = [*smooth, *(loss for _, loss in validation)] or [0.0, 1.0]
    pad = 0.15 * (max(shown) - min(shown)) or 0.1 * abs(shown[0]) or 1.0
    low, high = max(min(shown) - pad, 0.0), max(shown) + pad
    steps = max(len(losses), 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / steps
        y = bottom - (bottom - top) * (loss - low) / (high - low)
        return x, min(max(y, top), bottom)

    font = ImageFont.load_default(12)
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = at(0, value)
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 6, y), f"{value:.3f}", fill=INK, anchor="rm", font=font)
        step = round(steps * i / 4)
        draw.text((at(step, low)[0], bottom + 8), str(step), fill=INK, anchor="mt", font=font)
    for values, colour, width in ((losses, FAINT, 1), (smooth, LINE, 2)):
        points = [at(i + 1, loss) for i, loss in enumerate(values)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=width, joint="curve")
    marks = [at(step, loss) for step, loss in validation]
    if len(marks) > 1:
        draw.line(marks, fill=DOTS, width=2)
    for x, y in marks:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=DOTS)
    legend = "training loss (mean)" + ("    held-out loss" if validation else "")
    draw.text((left, SIZE[1] - 6), legend.split("    ")[0], fill=LINE, anchor="lb", font=font)
    if validation:
        draw.text((left + 150, SIZE[1] - 6), "held-out loss", fill=DOTS, anchor="lb", font=font)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last 5 % of the steps before each."""
    window = max(1, len(values) // 20)
    sums = np.cumsum([0.0, *values])
    return [
        float((sums[i] - sums[max(0, i - window)]) / min(i, window))
        for i in range(1, len(values) + 1)
    ]
