"""Pictures and the frames of clips out of files: upright, 8 bits a channel, cut to a plan."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...core.train.buckets import Plan
from ...core.train.folder import CLIPS, UnusableError

_ANIMATED = frozenset(("GIF", "WEBP", "PNG", "AVIF"))  # a TIFF's further pages are other pictures
_TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height
_ORIENTATION = 0x0112
# What decoders raise on files that are not what they say; AVIF's a RuntimeError.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error,
           Image.DecompressionBombError, av.error.FFmpegError)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """Of a file, without its pixels: (width, height) as it is looked at, frames."""

    size: tuple[int, int]
    frames: int


def facts(path: Path) -> Facts:
    """Size and number of frames of a picture or clip.

    Raises:
        UnusableError: empty, broken, or not what its name says.
    """
    with _reading(path):
        if path.suffix.lower() in CLIPS:
            return _clip_facts(path)
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            size = image.size[::-1] if turned else image.size
            frames = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
            return Facts((size[0], size[1]), frames)


def frames(path: Path, first: int = 0, count: int = 1, every: int = 1) -> list[Image.Image]:
    """``count`` frames from the ``first`` on, each ``every``-th, as RGB or RGBA.

    Raises:
        UnusableError: broken, or it has fewer frames.
    """
    wanted = range(first, first + count * every, every)
    with _reading(path):
        if path.suffix.lower() in CLIPS:
            found = list(_decoded(path, wanted))
        else:
            with Image.open(path) as image:
                found = [_frame(image, i) for i in wanted]
    if len(found) < count:
        raise UnusableError("It ends early", found=f"{len(found)} of {count} frames")
    return found


def pixels(images: list[Image.Image], plan: Plan, flip: bool = False) -> Tensor:
    """(frames, height, width, 3) in [0, 1], cut and resized by ``plan``, over white."""
    arrays = [np.asarray(_planned(_opaque(image), plan, flip)) for image in images]
    return torch.from_numpy(np.stack(arrays).astype(np.float32) / 255)


def alpha(image: Image.Image, plan: Plan, size: tuple[int, int], flip: bool = False
          ) -> Tensor | None:  # fmt: skip
    """What is opaque of ``image`` as a mask of ``size`` (width, height); None if all of it is."""
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255:
        return None
    return _mask(image.getchannel("A"), plan.box, size, flip)


def mask(path: Path, picture: tuple[int, int], plan: Plan, size: tuple[int, int],
         flip: bool = False) -> Tensor:  # fmt: skip
    """A mask file (height, width) of ``size`` for a picture of that size, by its brightness.

    A mask of another resolution is stretched over its picture; what is transparent is black.
    """
    (image,) = frames(path)
    x, y = image.width / picture[0], image.height / picture[1]
    left, top, right, bottom = plan.box
    box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return _mask(_opaque(image, 0).convert("L"), box, size, flip)


def _mask(grey: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int],
          flip: bool) -> Tensor:  # fmt: skip
    small = grey.resize(size, Image.Resampling.BOX, box=box)
    small = ImageOps.mirror(small) if flip else small
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def _planned(image: Image.Image, plan: Plan, flip: bool) -> Image.Image:
    small = image.resize(plan.size, Image.Resampling.LANCZOS, box=plan.box)
    return ImageOps.mirror(small) if flip else small


def _opaque(image: Image.Image, behind: int = 255) -> Image.Image:
    if image.mode != "RGBA":
        return image
    ground = Image.new("RGBA", image.size, (behind, behind, behind, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _frame(image: Image.Image, index: int) -> Image.Image:
    image.seek(index)
    frame: Any = ImageOps.exif_transpose(image)
    if frame.mode.startswith("I") or frame.mode == "F":
        return _of_numbers(np.asarray(frame))
    return frame.convert("RGBA" if frame.has_transparency_data else "RGB")


def _of_numbers(values: np.ndarray[Any, Any]) -> Image.Image:
    """Grey values of 16 or more bits, or fractions."""
    top = 1.0 if values.dtype.kind == "f" and values.max(initial=0) <= 1 else 65535.0
    grey = np.clip(values.astype(np.float64) / top, 0, 1) * 255
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def _clip_facts(path: Path) -> Facts:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UnusableError("It holds no video")
        frame = next(container.decode(video=0), None)
    if frame is None:
        raise UnusableError("It holds no frame")
    turned = frame.rotation // 90 % 2
    size = (frame.height, frame.width) if turned else (frame.width, frame.height)
    # Containers often don't say how many frames there are, or lie; packets are not decoded.
    with av.open(str(path)) as container:
        count = sum(1 for packet in container.demux(video=0) if packet.size)
    return Facts(size, max(1, count))


def _decoded(path: Path, wanted: range) -> Iterator[Image.Image]:
    """Those of the frames ``wanted`` that there are; the others are not brought to RGB."""
    sizes: list[str] = []
    with av.open(str(path)) as container:
        for i, frame in zip(range(wanted.stop), container.decode(video=0), strict=False):
            sizes = sizes[:1] + [f"{frame.width} x {frame.height}"]
            if sizes[0] != sizes[-1]:
                raise UnusableError(
                    "The size of its pictures changes",
                    found=f"{sizes[0]}, then {sizes[-1]} from frame {i} on",
                    fix="Cut it there into two files",
                )
            if i in wanted:
                array = frame.to_ndarray(format="rgb24")
                yield Image.fromarray(np.rot90(array, round(frame.rotation / 90)).copy())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a decoder raises, said plainly; the name of the file is the caller's to add."""
    try:
        if path.stat().st_size == 0:
            raise UnusableError("The file is empty", fix="Copy it again, or delete it")
        yield
    except Image.DecompressionBombError as error:
        raise UnusableError(
            "The picture is too large",
            found=str(error),
            fix="Scale it down; a part of it is all that is learned anyway",
        ) from error
    except _BROKEN as error:
        raise UnusableError(
            "The file cannot be read", found=str(error) or type(error).__name__,
            fix="Open and save it with another program, or delete it",
        ) from error  # fmt: skip
