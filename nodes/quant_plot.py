"""The picture of what quantising cost each layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.merge.outcome import counted
from ..core.quant import Report
from ..core.quant.report import Layer, sizes
from .plots import BACK, DOTS, FAINT, GRID, INK, LINE, as_tensor

_WIDTH, _LEFT, _RIGHT = 960, 64, 24
_SPAN = _WIDTH - _LEFT - _RIGHT
_SIZES, _CHART, _HEIGHT, _LIST = 48, 132, 240, 20  # tops of the parts, heights
_WIDEST = 96  # pixels of a bar
_NAMED = 6  # layers, reasons
_SOFT = "#9aa7bd"
# Kind of a layer by its path -> colour; the first that fits.
_KINDS = {
    "q, k, v": (r".*[._](?:to_|add_)?(?:qkv|kv|[qkv])(?:_proj|_linear|_img)?", LINE),
    "attention out": (r".*at+e?n.*", "#a3be8c"),
    "attention and MLP in one": (r".*linear[12]", "#b48ead"),
    "MLP": (r".*(?:mlp|ffn?|feed_forward|fc\d|\bw[123]\b|ff_context).*", DOTS),
    "other": (r".*", "#d08770"),
}
_Worst = Sequence[tuple[str, Layer]]


def kind_of(path: str) -> str:
    """Which of the kinds a layer is of."""
    return next(kind for kind, (regex, _) in _KINDS.items() if re.fullmatch(regex, path, re.S))


def quant_plot(report: Report) -> Tensor:
    """Sizes, the error of each layer and what was kept as an IMAGE, (1, h, w, 3) in [0, 1]."""
    worst, reasons = report.worst, _reasons(report)
    rows = max(min(len(worst), _NAMED), len(reasons))
    legend = _CHART + _HEIGHT + 34
    image = Image.new("RGB", (_WIDTH, legend + 56 + (rows + 1) * _LIST), BACK)
    page = _Page(ImageDraw.Draw(image))
    page.say((_LEFT, 14), report.verdict, size=16, room=_SPAN)
    _sizes(page, report)
    _errors(page, worst)
    _legend(page, worst, legend)
    half = _SPAN // 2
    page.rows(_LEFT, legend + 40, half - 16, "largest errors",
              [(_percent(layer.error), path) for path, layer in worst[:_NAMED]])  # fmt: skip
    page.rows(_LEFT + half, legend + 40, half, f"{counted(len(report.kept), 'layer')} kept as "
              "before", [(str(count), why) for why, count in reasons])  # fmt: skip
    return as_tensor(image)


@dataclass
class _Page:
    draw: ImageDraw.ImageDraw

    def say(self, at: tuple[float, float], text: str, colour: str = INK, anchor: str = "lt",
            size: int = 12, room: float = math.inf) -> float:  # fmt: skip
        """Write ``text``, without its beginning where it is wider than ``room``; where it ends."""
        font = ImageFont.load_default(size)
        text = "".join(c if c.isprintable() else "?" for c in text)
        whole = text
        while font.getlength(text) > room:
            whole = whole[1:]
            text = f"...{whole}"
        self.draw.text(at, text, fill=colour, anchor=anchor, font=font)
        return at[0] + font.getlength(text)

    def rows(
        self, x: float, y: float, room: float, title: str, pairs: list[tuple[str, str]]
    ) -> None:
        """A heading and (number, text) lines."""
        self.say((x, y), title, _SOFT, room=room)
        for i, (number, text) in enumerate(pairs, 1):
            self.say((x + 44, y + i * _LIST), number, anchor="rt")
            self.say((x + 52, y + i * _LIST), text, room=room - 52)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _reasons(report: Report) -> list[tuple[str, int]]:
    """Why layers were kept, the most frequent first, and of how many."""
    found = Counter(report.kept.values()).most_common()
    if len(found) <= _NAMED:
        return found
    shown, rest = found[: _NAMED - 1], found[_NAMED - 1 :]
    return [*shown, (f"{len(rest)} other reasons", sum(count for _, count in rest))]


def _sizes(page: _Page, report: Report) -> None:
    """Two bars, below each other."""
    most = max(report.before, report.after, 1)
    named = (("before", report.before, FAINT), ("after", report.after, LINE))
    room = _SPAN - 110
    for i, (name, size, colour) in enumerate(named):
        y = _SIZES + i * 22
        page.say((_LEFT - 8, y + 8), name, anchor="rm")
        right = _LEFT + max(room * size / most, 1)
        page.draw.rectangle([_LEFT, y, right, y + 15], fill=colour)
        page.say((right + 8, y + 8), sizes(size), anchor="lm")


def _errors(page: _Page, worst: _Worst) -> None:
    """A bar a layer, the largest error first."""
    bottom, high = _CHART + _HEIGHT, max((layer.error for _, layer in worst), default=0.0)
    tick = _round(high / 4)
    page.say((_LEFT, _CHART - 22), "relative error of each layer's weight, largest first", _SOFT)
    for i in range(5):
        y = bottom - _HEIGHT * i / 4
        page.draw.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], fill=GRID)
        page.say((_LEFT - 8, y), _percent(tick * i), anchor="rm")
    step = min(_SPAN / max(len(worst), 1), _WIDEST)
    gap = 1 if step > 4 else 0
    for i, (path, layer) in enumerate(worst):
        left = _LEFT + i * step
        top = bottom - _HEIGHT * layer.error / (4 * tick)
        box = (left, min(top, bottom), max(left + step - 1 - gap, left), bottom)
        page.draw.rectangle(box, fill=_KINDS[kind_of(path)][1])
    page.say((_LEFT, bottom + 8), "1")
    if len(worst) > 1:
        page.say((_LEFT + step * len(worst), bottom + 8), str(len(worst)), anchor="rt")


def _legend(page: _Page, worst: _Worst, y: int) -> None:
    """Kinds that there are, how many of each, and their mean error."""
    found: dict[str, list[float]] = {}
    for path, layer in worst:
        found.setdefault(kind_of(path), []).append(layer.error)
    x = float(_LEFT)
    for kind in filter(found.__contains__, _KINDS):
        errors = found[kind]
        text = f"{kind}: {len(errors)}, mean {_percent(sum(errors) / len(errors))}"
        page.draw.rectangle([x, y + 1, x + 9, y + 10], fill=_KINDS[kind][1])
        x = page.say((x + 14, y), text, size=11) + 14


def _round(step: float) -> float:
    """The next round number from ``step`` up."""
    unit = 10.0 ** math.floor(math.log10(step)) if step > 0 else 0.0025
    return next(n * unit for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if n * unit >= step * 0.999)
