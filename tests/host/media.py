"""Picture and video files made on the spot."""

from __future__ import annotations

import av
import numpy as np
from PIL import Image


def picture(path, width=64, height=64, mode="RGB", seed=0, **options):
    """A smooth picture of random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8), "RGBA")
    image = small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(path, **options)
    return image


def video(path, count=10, width=64, height=48, turned=0):
    """Frame i is grey of 20 * i, its first columns white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for i in range(count):
            array = np.full((height, width, 3), 20 * i, np.uint8)
            array[:, :8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
