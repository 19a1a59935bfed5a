"""Aspect buckets: sizes of about one area, and how a picture is brought to one of them.

A bucket's sides are multiples of a step and its area is at most ``resolution`` squared. The list
is that of musubi-tuner's ``BucketSelector`` (sd-scripts' ``make_bucket_resolutions`` with the same
least side holds these, and emptier ones beside them). A picture goes to the bucket that crops
least of it, which is the nearest aspect by ratio; both of those trainers take the difference of
the aspects, which treats a portrait otherwise than the same picture turned by 90 degrees.

Without upscaling a picture of no more than the area keeps its size but for what the step cuts
off, as in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..errors import AdapterLabError

Size = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How one picture is brought to its bucket: cut ``box`` out of it, resize that to ``size``.

    Attributes:
        size: (width, height) of the bucket in pixels.
        box: (left, top, right, bottom) in pixels of the picture, fractions included, centred.
    """

    size: Size
    box: tuple[float, float, float, float]

    @property
    def scale(self) -> float:
        """Above 1 the picture is enlarged."""
        return self.size[0] / (self.box[2] - self.box[0])


@dataclass(frozen=True)
class Buckets:
    """The buckets of one resolution.

    Args:
        resolution: side of a square of the wanted area, in pixels.
        step: the sides are multiples of it; what the VAE scales down by, times the patch of the
            model, is the least that works.
        upscale: whether small pictures are enlarged.
        limit: the longest side over the shortest is about this at most.
        square: one bucket only, the square.
    """

    resolution: int = 1024
    step: int = 64
    upscale: bool = False
    limit: float = 4.0
    square: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.step <= self.resolution and 1 <= self.limit < math.inf):
            raise AdapterLabError(
                "The buckets have impossible sizes",
                found=f"resolution {self.resolution}, step {self.step}, aspect {self.limit}",
                expected="a step of at most the resolution, an aspect of at least 1",
            )

    @cached_property
    def sizes(self) -> list[Size]:
        """(width, height) of every bucket for pictures that have pixels enough, by width."""
        side = self.resolution // self.step * self.step
        if self.square:
            return [(side, side)]
        least = max(self.step, int(self.resolution / math.sqrt(self.limit)))
        found: set[Size] = set()
        for short in range(least // self.step * self.step, side + 1, self.step):
            long = self.resolution**2 // short // self.step * self.step
            found |= {(short, long), (long, short)}
        return sorted(found)

    def plan(self, width: int, height: int) -> Plan:
        """The plan of a picture of ``width`` x ``height`` pixels.

        Raises:
            AdapterLabError: a side below one step, which would have to be enlarged.
        """
        if min(width, height) < 1 or (not self.upscale and min(width, height) < self.step):
            raise AdapterLabError(
                "The picture is too small",
                found=f"{width} x {height} pixels",
                expected=f"at least {self.step} on each side",
                fix="Leave it out, or allow upscaling",
            )
        size = self._size(width, height)
        scale = max(size[0] / width, size[1] / height)
        cut = (size[0] / scale, size[1] / scale)
        left, top = (width - cut[0]) / 2, (height - cut[1]) / 2
        box = (max(0.0, left), max(0.0, top), min(left + cut[0], width), min(top + cut[1], height))
        return Plan(size, box)

    def _size(self, width: int, height: int) -> Size:
        whole = (width // self.step * self.step, height // self.step * self.step)
        if not self.upscale and not self.square and width * height <= self.resolution**2:
            return whole
        aspect = math.log(width / height)
        size = min(self.sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), -s[0] * s[1]))
        # A very long picture of many pixels can still be narrower than its bucket.
        return size if self.upscale else (min(size[0], whole[0]), min(size[1], whole[1]))


def frames(available: int, wanted: int, ratio: int) -> int:
    """The most frames of ``available``, at most ``wanted``, that a VAE keeps: n * ``ratio`` + 1."""
    return (min(available, wanted) - 1) // ratio * ratio + 1


def starts(available: int, length: int, clips: int) -> list[int]:
    """First frames of up to ``clips`` clips that don't overlap, evenly spread from the first on."""
    count = max(1, min(clips, available // max(1, length)))
    room = available - length
    return [round(i * room / (count - 1)) for i in range(count)] if count > 1 else [0]
