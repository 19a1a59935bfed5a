"""The demo's folder of pictures with captions, as a user would bring one."""

import shutil

import numpy as np
from concept import PRIOR, SHOWN, STARS
from PIL import Image
from shapes import BASE_SHAPES, COLOURS, draw


def write_folder(folder):
    """Stars in four colours, and regularisation pictures that keep the old shapes, in ``reg``."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(6)
    for colour in SHOWN:
        _write(folder, rng, f"{colour} star plain", STARS, 1.0, (16.5, 17.5))
    rng = np.random.default_rng(7)
    for caption in (f"{c} {s} plain" for c in COLOURS for s in BASE_SHAPES):
        _write(folder / "reg", rng, caption, PRIOR)


def _write(folder, rng, caption, count, *how):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{caption.replace(' ', '_')}_{number}.png"
        picture = (draw(rng, caption, *how) * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(path, optimize=True)
        path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
