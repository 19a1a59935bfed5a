"""Reads colour and shape off a picture of the demo world. Needs numpy and Pillow.

The mask is the largest saturated patch; the colour is the palette's nearest to the mask's mean; the
shape is the template with which the mask, cropped and fitted to a square, overlaps best.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from shapes import COLOURS, OUTLINES, SIZE, coverage

SATURATED, SMALLEST, CLEAR, GRID = 0.3, 60, 0.7, 48


@dataclass(frozen=True)
class Reading:
    """``colour`` and ``shape`` are None where nothing, or nothing clear, is drawn.

    ``overlap`` is the best IoU in [0, 1], ``area`` the mask's share of the picture.
    """

    colour: str | None
    shape: str | None
    overlap: float
    area: float


def pixels(picture):
    """A PIL image, or an array of uint8 or of floats in [0, 1], as (h, w, 3) floats."""
    array = np.asarray(picture)[..., :3]
    return array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def saturated(array):
    """Mask of the pixels that belong to a shape; (h, w, 3) -> (h, w) bool."""
    top = array.max(-1)
    return largest(top - array.min(-1) > SATURATED * np.maximum(top, 1e-6))


def largest(mask):
    """The largest 4-connected patch of a mask: labels spread until nothing changes; (h, w)."""
    labels = np.pad(np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0), 1)
    inside, before = labels > 0, None
    while before is None or (labels != before).any():
        before = labels
        beside = [np.roll(labels, step, axis) for axis in (0, 1) for step in (-1, 1)]
        labels = np.where(inside, np.maximum.reduce([labels, *beside]), 0)
    labels = labels[1:-1, 1:-1]
    return mask & (labels == np.bincount(labels[mask], minlength=1).argmax())


def fitted(mask):
    """The mask's bounding box, padded to a square, at (48, 48); bool."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(box.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
    square[top : top + box.shape[0], left : left + box.shape[1]] = box * np.uint8(255)
    return np.asarray(Image.fromarray(square).resize((GRID, GRID), Image.BILINEAR)) > 127


@cache
def templates():
    """Name -> fitted mask of each outline."""
    middle = (SIZE / 2, SIZE / 2)
    return {name: fitted(coverage(name, middle, 17.0) > 0.5) for name in OUTLINES}


def read(picture):
    """The Reading of one picture (h, w, 3)."""
    array = pixels(picture)
    mask = saturated(array)
    if mask.sum() < SMALLEST * array.shape[0] * array.shape[1] / SIZE**2:
        return Reading(None, None, 0.0, float(mask.mean()))
    mean = array[mask].mean(0)
    colour = min(COLOURS, key=lambda name: float(np.square(mean - COLOURS[name]).sum()))
    shape = fitted(mask)
    overlaps = {
        name: float((shape & t).sum() / (shape | t).sum()) for name, t in templates().items()
    }
    best = max(overlaps, key=overlaps.__getitem__)
    found = best if overlaps[best] >= CLEAR else None
    return Reading(colour, found, overlaps[best], float(mask.mean()))


def rates(pictures, captions):
    """Shares of pictures whose colour, shape, and both are their caption's."""
    readings = [read(picture) for picture in pictures]
    wanted = [caption.split()[:2] for caption in captions]
    pairs = list(zip(readings, wanted, strict=True))
    colour = [r.colour == w[0] for r, w in pairs]
    shape = [r.shape == w[1] for r, w in pairs]
    return {
        "colour": float(np.mean(colour)),
        "shape": float(np.mean(shape)),
        "both": float(np.mean(np.logical_and(colour, shape))),
    }
