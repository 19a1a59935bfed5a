"""Files of every kind as pixels, against Pillow."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from adapter_lab.core.train.buckets import Buckets
from adapter_lab.core.train.folder import UnusableError
from adapter_lab.nodes.host import pictures
from media import picture, video
from PIL import Image

KINDS = {
    "rgb.jpg": "RGB", "grey.png": "L", "bits.bmp": "1", "palette.gif": "P", "alpha.webp": "RGBA",
    "grey_alpha.png": "LA", "cmyk.jpg": "CMYK", "deep.png": "I;16", "float.tiff": "F",
    "picture.avif": "RGB", "palette.png": "P",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures(tmp_path, name):
    """A grey ramp comes out as itself, whatever it is stored as."""
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    mode, image = KINDS[name], Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = image.quantize(64) if mode == "P" else image.convert("RGB").convert(mode)
    image.save(tmp_path / name)
    assert pictures.facts(tmp_path / name) == pictures.Facts((64, 64), 1)
    found = pictures.pixels(pictures.frames(tmp_path / name), Buckets(64, 64).plan(64, 64))
    assert found.shape == (1, 64, 64, 3)
    wanted = (grey > 127) if mode == "1" else grey / 255
    assert float((found[0, ..., 0] - torch.tensor(wanted).float()).abs().mean()) < (
        0.25 if mode == "1" else 0.03
    )


def test_a_damaged_avif(tmp_path):
    """Its decoder raises what no other does."""
    picture(tmp_path / "a.avif", 64, 64)
    data = (tmp_path / "a.avif").read_bytes()
    start = data.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(UnusableError, match="cannot be read"):
        pictures.frames(tmp_path / "a.avif")


def test_turned_by_exif(tmp_path):
    image = picture(tmp_path / "a.jpg", 64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert pictures.facts(tmp_path / "a.jpg").size == (32, 64)
    (found,) = pictures.frames(tmp_path / "a.jpg")
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270), np.float32)
    assert np.abs(np.asarray(found, np.float32) - upright).mean() < 6


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")
    found = pictures.pixels(pictures.frames(tmp_path / "a.png"), Buckets(64).plan(64, 64))
    assert bool((found == 1).all())


def test_a_clip_of_two_sizes(tmp_path):
    """Frames of another size in the same stream, as recorders of screens write them."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(6):
            width, height = (64, 48) if i < 4 else (32, 24)
            coder = av.CodecContext.create("mjpeg", "w")
            coder.width, coder.height, coder.pix_fmt = width, height, "yuvj420p"
            coder.time_base = Fraction(1, 10)
            array = np.full((height, width, 3), 20 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = i, coder.time_base
            for packet in coder.encode(frame) + coder.encode(None):
                packet.stream = stream
                container.mux(packet)
    assert len(pictures.frames(path, 0, 4)) == 4
    for wanted in ((0, 6), (5, 1)):
        with pytest.raises(UnusableError, match="64 x 48, then 32 x 24 from frame 4 on"):
            pictures.frames(path, *wanted)


def test_a_turned_clip(tmp_path):
    """Phones store the rotation beside the frames; ComfyUI's own video loader turns them so."""
    from comfy_api.latest import InputImpl

    video(tmp_path / "a.mp4", 3, turned=90)
    theirs = InputImpl.VideoFromFile(str(tmp_path / "a.mp4")).get_components().images
    ours = pictures.frames(tmp_path / "a.mp4", 0, 3)
    assert pictures.facts(tmp_path / "a.mp4") == pictures.Facts((48, 64), 3)
    for image, expected in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(image) / 255 - expected.numpy()).mean() < 0.02
