"""Pictures through the VAE and captions through CLIP, each only once: kept by content."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.atomic import telling
from ...core.errors import AdapterLabError
from ...core.train.buckets import Buckets, Plan
from ...core.train.cache import Cache, first_bad
from ...core.train.data import require_plausible
from . import pictures
from .fingerprint import tensor_fingerprint
from .latents import text_of
from .layers import bare, submodules

VERSION = 1  # of what is made of the same files; a change of it makes everything anew
PATCH = 2  # tokens of nearly all models are two by two places of the latent
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Picture:
    """One item of a dataset before it is encoded: a picture, or ``count`` frames of a clip.

    Attributes:
        sha: of the bytes of the file.
        size: (width, height) of the picture in pixels.
        mask: file of its mask.
        use_alpha: whether what is transparent does not count, if there is no mask.
    """

    path: Path
    sha: str
    size: tuple[int, int]
    plan: Plan
    first: int = 0
    count: int = 1
    every: int = 1
    mask: Path | None = None
    use_alpha: bool = False

    def told(self, flip: bool) -> list[Any]:
        """What its pixels depend on."""
        return [self.sha, self.plan.size, self.plan.box, flip, self.first, self.count, self.every]


class Encoder:
    """A VAE and a CLIP with what they have encoded already.

    Raises:
        AdapterLabError: not a VAE of pictures, or None in place of one.
    """

    def __init__(self, vae: Any, clip: Any, cache: Cache) -> None:
        self.vae, self.clip, self.cache = vae, clip, cache
        if vae is None or clip is None:
            raise AdapterLabError(
                f"There is no {'VAE' if vae is None else 'text encoder'}",
                found="a checkpoint that holds none",
                fix="Load it from a file of its own",
            )
        vae.throw_exception_if_invalid()
        if vae.latent_dim not in (2, 3) or vae.extra_1d_channel is not None:
            raise AdapterLabError(
                "This VAE does not encode pictures",
                found=f"latents over {vae.latent_dim} axes",
                fix="Load the VAE that belongs to the model",
            )
        self.down = max(1, round(vae.spacial_compression_encode()))
        self.is_video = vae.latent_dim == 3 and not vae.not_video
        formula = vae.downscale_index_formula
        self.ratio = int(formula[0]) if self.is_video and isinstance(formula, tuple) else 1
        self._vae_id, self._clip_id = _identity(vae), _identity(clip)

    def fitted(self, buckets: Buckets) -> Buckets:
        """``buckets`` with a step that this VAE and a model's patches divide."""
        least = self.down * PATCH
        step = math.lcm(buckets.step, least)
        return replace(buckets, step=step, resolution=max(buckets.resolution, step))

    def latent(self, picture: Picture, flip: bool = False) -> Tensor:
        """(c, h, w), or (c, t, h, w) of a VAE for clips, mapped from its file."""
        key = _key("latent", self._vae_id, *picture.told(flip))
        return self.cache.get(key, lambda: self._encoded(picture, flip))["latent"]

    def text(self, caption: str) -> tuple[Tensor | None, dict[str, Any]]:
        """Conditioning of ``caption``: text (tokens, dim) and the rest."""
        key = _key("text", self._clip_id, caption)
        value = self.cache.get(key, lambda: self._text(caption))
        return value["cond"], value["extra"]

    def mask(self, picture: Picture, flip: bool = False) -> Tensor | None:
        """(h, w) at the size of the latent, None where everything counts."""
        if picture.mask is None and not picture.use_alpha:
            return None
        source = sha256(picture.mask) if picture.mask else "alpha"
        key = _key("mask", source, *picture.told(flip), self.down)
        return self.cache.get(key, lambda: {"mask": self._mask(picture, flip)})["mask"]

    def _encoded(self, picture: Picture, flip: bool) -> dict[str, Any]:
        images = pictures.frames(picture.path, picture.first, picture.count, picture.every)
        samples = self.vae.encode(pictures.pixels(images, picture.plan, flip))
        value = self._checked({"latent": samples[0].to("cpu", copy=True)}, "VAE")
        require_plausible(value["latent"], "What the VAE gives")
        return value

    def _text(self, caption: str) -> dict[str, Any]:
        entries = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        if len(entries) != 1:
            raise AdapterLabError(
                "The text encoder gives several conditionings for one caption",
                fix="Connect it without hooks that change over the steps",
            )
        cond, extra = text_of(entries[0])
        return self._checked({"cond": cond, "extra": extra}, "text encoder")

    def _checked(self, value: dict[str, Any], what: str) -> dict[str, Any]:
        bad = first_bad(value)
        if bad is not None:
            raise AdapterLabError(
                f"The {what} gives NaN or infinite values",
                found=f"in its {bad}",
                fix="Start ComfyUI with --fp32-vae or --bf16-vae" if what == "VAE"
                else "Start ComfyUI with --fp32-text-enc",
            )  # fmt: skip
        return value

    def _mask(self, picture: Picture, flip: bool) -> Tensor | None:
        width, height = picture.plan.size
        size = (width // self.down, height // self.down)
        if picture.mask is not None:
            return pictures.mask(picture.mask, picture.size, picture.plan, size, flip)
        (image,) = pictures.frames(picture.path, picture.first)
        return pictures.alpha(image, picture.plan, size, flip)


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    digest = hashlib.sha256()
    with telling(f"Cannot read '{path.name}'"), open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *what]).encode()).hexdigest()[:32]


@torch.no_grad()
def _identity(coder: Any) -> str:
    """What the encodings of a VAE or CLIP depend on: some values of every weight, patches on them,
    the layer that is read, the tokenizer."""
    patcher = coder.patcher
    weights = {
        f"{path}.{name}": bare(patcher, f"{path}.{name}", parameter)
        for path, module in submodules(patcher.model).items()
        for name, parameter in {**module._parameters, **module._buffers}.items()
        if parameter is not None
    }
    patches = [[k, *(p[:3] for p in put)] for k, put in sorted(patcher.patches.items())]
    settings = [
        type(patcher.model).__name__,
        type(getattr(coder, "tokenizer", None)).__name__,
        getattr(coder, "layer_idx", None),
        sorted(map(repr, getattr(coder, "tokenizer_options", {}).items())),
    ]
    told: dict[str, Any] = {"weights": weights, "patches": patches, "settings": settings}
    return tensor_fingerprint(told)
