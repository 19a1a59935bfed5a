"""Coloured shapes on pale grounds, their captions, and the vectors of the words in them.

A picture is ``(64, 64, 3)`` float32 in [0, 1]. A caption is "colour shape ground", for instance
"red circle plain". Needs numpy alone.
"""

import hashlib
import math

import numpy as np

SIZE = 64
TOKENS = 4
COLOURS = {
    "red": (0.86, 0.14, 0.14),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.14, 0.30, 0.86),
    "yellow": (0.95, 0.80, 0.08),
    "purple": (0.56, 0.16, 0.72),
    "orange": (0.96, 0.50, 0.06),
}
BASE_SHAPES = ("circle", "square", "triangle")
GROUNDS = ("plain", "gradient")
# corners, inner radius / outer radius, turn in sectors, outer radius / nominal radius.
# A regular polygon is the star whose inner corners lie on the straight edges.
OUTLINES = {
    "circle": (0, 1.0, 0.0, 1.0),
    "square": (4, math.cos(math.pi / 4), 1.0, 1.25),
    "triangle": (3, math.cos(math.pi / 3), 0.0, 1.35),
    "star": (5, 0.45, 0.0, 1.35),
}
_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5


def edge_distance(centre, radius, corners, inner, turn=0.0):
    """Signed distance in pixels to the outline of a star polygon, negative inside; (64, 64)."""
    x, y = _AXIS[None] - centre[0], _AXIS[:, None] - centre[1]
    reach = np.hypot(x, y)
    if not corners:
        return reach - radius
    sector = math.pi / corners
    angle = np.arctan2(x, -y) + (turn + 1) * sector
    angle = np.abs(angle % (2 * sector) - sector)
    tip = np.array([radius, 0.0], dtype=np.float32)
    notch = inner * radius * np.array([math.cos(sector), math.sin(sector)], dtype=np.float32)
    along = (notch - tip) / np.linalg.norm(notch - tip)
    across = (along[1], -along[0])
    return (reach * np.cos(angle) - tip[0]) * across[0] + reach * np.sin(angle) * across[1]


def coverage(shape, centre, radius):
    """Share of each pixel that a named shape covers; ``radius`` is nominal; (64, 64)."""
    corners, inner, turn, factor = OUTLINES[shape]
    distance = edge_distance(centre, radius * factor, corners, inner, turn)
    return np.clip(0.5 - distance, 0.0, 1.0)


def ground_picture(rng, ground):
    """A pale ground: one tint, or a linear run between a light and a darker tint; (64, 64, 3).

    "dusk", which no caption names, is one darker, bluish tint."""
    if ground == "dusk":
        dark = np.array((0.46, 0.51, 0.58)) + rng.uniform(-0.03, 0.03, 3)
        return np.broadcast_to(dark, (SIZE, SIZE, 3)).astype(np.float32)
    light = rng.uniform(0.84, 0.96) + rng.uniform(-0.04, 0.04, 3)
    if ground == "plain":
        return np.broadcast_to(light, (SIZE, SIZE, 3)).astype(np.float32)
    dark = light - rng.uniform(0.20, 0.30)
    way = rng.uniform(0, 2 * math.pi)
    run = math.cos(way) * (_AXIS[None] - SIZE / 2) + math.sin(way) * (_AXIS[:, None] - SIZE / 2)
    share = np.clip(0.5 + run / SIZE, 0.0, 1.0)[..., None]
    return (light + (dark - light) * share).astype(np.float32)


def paint(picture, cover, colour):
    """Lay a colour over a picture where ``cover`` (64, 64) says so."""
    return (picture + (np.asarray(colour) - picture) * cover[..., None]).astype(np.float32)


def draw(rng, caption, jitter=4.0, radii=(15.0, 19.0), ground=None):
    """The picture of a caption; centre within ``jitter`` px of the middle, radius in ``radii``.

    ``ground``: another one than the caption names.
    """
    colour, shape, named = caption.split()
    centre = SIZE / 2 + rng.uniform(-jitter, jitter, 2)
    # The centroid of a triangle lies low in its box; the offset centres the box instead.
    radius = rng.uniform(*radii)
    centre[1] += 0.25 * OUTLINES[shape][3] * radius if shape == "triangle" else 0.0
    shade = np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-0.03, 0.03, 3), 0.0, 1.0)
    return paint(ground_picture(rng, ground or named), coverage(shape, centre, radius), shade)


def base_caption(rng):
    """A random caption of the base world; three grounds in four are plain."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(BASE_SHAPES)
    return f"{colour} {shape} {GROUNDS[int(rng.random() < 0.25)]}"


def scribble(rng):
    """One to three random polygons, stars, discs or rings: variety for the autoencoder."""
    picture = ground_picture(rng, rng.choice(GROUNDS))
    for _ in range(rng.integers(1, 4)):
        corners = int(rng.choice([0, 3, 4, 5, 6, 7]))
        regular = math.cos(math.pi / corners) if corners else 1.0
        inner = regular * rng.uniform(0.5, 1.0)
        centre, radius = rng.uniform(8, SIZE - 8, 2), rng.uniform(6, 26)
        distance = edge_distance(centre, radius, corners, inner, rng.uniform(0, 2))
        if rng.random() < 0.25:
            distance = np.abs(distance) - rng.uniform(1.5, 4)
        picture = paint(picture, np.clip(0.5 - distance, 0, 1), rng.uniform(0, 1, 3))
    return picture


def word_vector(word):
    """A fixed vector for any word, from its SHA-256: no table, unit variance; (64,)."""
    digests = b"".join(hashlib.sha256(f"{i} {word}".encode()).digest() for i in range(2))
    return ((np.frombuffer(digests, dtype=np.uint8) - 127.5) / 73.9).astype(np.float32)


def encode_caption(caption):
    """Token vectors (4, 64) and their pooled vector (64,); "" is four pads and zeros."""
    words = caption.split()
    cond = np.stack([word_vector(w) for w in (words + ["<pad>"] * TOKENS)[:TOKENS]])
    pooled = cond[: len(words)].sum(0) / math.sqrt(max(len(words), 1))
    return cond, pooled.astype(np.float32)
