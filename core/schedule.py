"""A strength over the progress of sampling, as text: "0@0, 1@0.3, 0.2@1"."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from .errors import AdapterLabError

_EXAMPLE = (
    "strengths at points from 0 (pure noise) to 1 (finished picture), such as '0@0, 1@0.3, 0.2@1'"
)


@dataclass(frozen=True)
class Schedule:
    """Piecewise linear, constant before the first point and after the last.

    Attributes:
        points: (progress, strength) by rising progress; two of one progress are a jump, at which
            the second holds.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    @property
    def constant(self) -> float | None:
        """The one strength it has everywhere; None where it changes."""
        strengths = {strength for _, strength in self.points}
        return strengths.pop() if len(strengths) == 1 else None

    def at(self, progress: float) -> float:
        """The strength at ``progress``, 0 at the start of sampling and 1 at its end."""
        if len(self.points) == 1:  # torch.compile cannot follow a bisection
            return self.points[0][1]
        after = bisect_right(self.points, progress, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(after - 1, 0)][1]
        (start, low), (end, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (progress - start) / (end - start)


def parse(text: str) -> Schedule:
    """The schedule that ``text`` spells: points ``strength@progress``, comma or line between them.

    One number alone is that strength throughout, an empty text is 1.

    Raises:
        AdapterLabError: a point that is none, progress outside 0 to 1, or three at one progress.
    """
    pieces = [piece.strip() for piece in text.replace("\n", ",").split(",") if piece.strip()]
    points = sorted((_point(p, len(pieces) == 1) for p in pieces), key=lambda point: point[0])
    for first, third in zip(points, points[2:], strict=False):
        if first[0] == third[0]:
            found = f"three at {first[0]:g}"
            raise AdapterLabError("The schedule has too many points in one place", found=found)
    return Schedule(tuple(points)) if points else Schedule()


def _point(piece: str, alone: bool) -> tuple[float, float]:
    strength, at, progress = piece.partition("@")
    try:
        point = (float(progress) if at else 0.0, float(strength))
    except ValueError:
        point = (math.nan, math.nan)
    if not (at or alone) or not all(map(math.isfinite, point)):
        raise AdapterLabError(
            "The schedule has a point that is none", found=f"'{piece}'", expected=_EXAMPLE
        )
    if not 0 <= point[0] <= 1:
        raise AdapterLabError(
            "The schedule has a point outside sampling", found=f"'{piece}'", expected=_EXAMPLE
        )
    return point
