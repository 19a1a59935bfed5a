"""Pictures sampled while training, with the adapter as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.atomic import replacing, write_all
from ...core.checks import require_choice, require_range
from ...core.errors import AdapterLabError
from ...core.files import Adapter
from ...core.train.checkpoints import TrainRun
from . import model as host
from .memory import is_out_of_memory

_LONGEST = 300  # letters of a message of others
_FRAME = 62  # milliseconds, 16 a second
# What a model says to conditioning, sizes or samplers that are not for it.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError)
_TEXT = "Encode the prompts of previews with the text encoder that belongs to the model"
_VAE = "Connect the VAE that belongs to the model, or none for rough colours"


@dataclass(frozen=True)
class PreviewConfig:
    """What to sample, and how often.

    Args:
        positive, negative: CONDITIONING; without ``negative`` that of the prompt with zeros in it.
        vae: decodes the latents; without one the rough colours of the latent are shown.
        width, height: pixels. frames: of a model of clips.
        steps, cfg, sampler, scheduler: as a sampler node has them.
        seed: of the noise, the same for every preview.
        every: training steps between two previews; also before the first step.
    """

    positive: Any
    negative: Any = None
    vae: Any = None
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0
    every: int = 100
    sampler: str = "euler"
    scheduler: str = "simple"
    frames: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "height", "steps", "every", "frames"):
            require_range(name, getattr(self, name), 1)
        require_choice("sampler", self.sampler, SAMPLERS)
        require_choice("scheduler", self.scheduler, SCHEDULERS)


SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass
class Previews:
    """The previews of one run.

    Attributes:
        shown: (step, images as ComfyUI's client finds them).
        failure: why there are no more of them; "" while there are.
    """

    config: PreviewConfig
    run: TrainRun
    root: Path
    shown: list[tuple[int, list[dict[str, str]]]] = field(
        default_factory=list[tuple[int, list[dict[str, str]]]]
    )
    failure: str = ""

    def due(self, step: int) -> bool:
        """Whether a preview belongs after ``step`` completed steps."""
        return not self.failure and step % self.config.every == 0

    def take(self, model: Any, adapter: Adapter | None, step: int) -> list[dict[str, str]]:
        """Sample ``model`` with ``adapter`` on a clone of it, and write the picture.

        An error ends the previews and not the run: it is kept in ``failure``.
        """
        try:
            with torch.inference_mode(), torch.no_grad():
                if adapter is not None:
                    model = host.apply(model, None, adapter, 1.0, 0.0, "error").model
                with _blaming("sampling", _TEXT):
                    latent = sample(model, self.config)
                with _blaming("decoding", _VAE):
                    pictures = decode(model, self.config, latent)
            path = self._write(pictures, step)
        except (AdapterLabError, *_REFUSALS) as error:
            comfy.model_management.soft_empty_cache()
            self.failure = f"no previews after step {step}: {error}"
            return []
        images = [self._image(path)]
        self.shown.append((step, images))
        return images

    def known(self, step: int) -> None:
        """Take up the pictures that were sampled up to ``step``."""
        found = sorted(self.run.previews.glob("*-step????????.png"))
        shown = [(int(p.stem[-8:]), [self._image(p)]) for p in found if p.stem[-8:].isdecimal()]
        self.shown = [row for row in shown if row[0] <= step]

    def _write(self, pictures: list[Image.Image], step: int) -> Path:
        path = self.run.previews / f"{self.run.name}-step{step:08}.png"
        first, *rest = pictures
        more: dict[str, Any] = dict(save_all=True, append_images=rest, duration=_FRAME, loop=0)
        data = BytesIO()
        first.save(data, "PNG", **(more if rest else {}))
        with replacing(path) as file:
            write_all(file, data.getbuffer())
        return path

    def _image(self, path: Path) -> dict[str, str]:
        folder = path.parent.relative_to(self.root).as_posix()
        return {"filename": path.name, "subfolder": folder, "type": "output"}


@contextmanager
def _blaming(work: str, fix: str) -> Iterator[None]:
    """Names the ``work`` that failed inside, and what to do."""
    try:
        yield
    except AdapterLabError:
        raise
    except _REFUSALS as error:
        full = is_out_of_memory(error)
        said = str(error).split("\n")[0][:_LONGEST] or type(error).__name__
        raise AdapterLabError(
            f"{work} failed", found=f"'{said}'",
            fix="Make 'width' and 'height' of the preview smaller" if full else fix,
        ) from error  # fmt: skip


def empty(model: Any, width: int, height: int, frames: int = 1) -> Tensor:
    """The latent of nothing that the empty latent nodes make for this model.

    (1, c, h, w), of a model of clips (1, c, t, h, w); sizes in pixels are rounded down.
    """
    wanted = model.get_model_object("latent_format")
    scale = wanted.spacial_downscale_ratio
    size = [max(1, height // scale), max(1, width // scale)]
    if wanted.latent_dimensions == 1:
        size = [max(1, width // scale)]
    elif wanted.latent_dimensions == 3:
        size = [(frames - 1) // wanted.temporal_downscale_ratio + 1, *size]
    return torch.zeros(1, wanted.latent_channels, *size)


def sample(model: Any, config: PreviewConfig) -> Tensor:
    """The latent that a sampler node gives; the global generators stay as they are."""
    latent = empty(model, config.width, config.height, config.frames)
    negative = _zeroed(config.positive) if config.negative is None else config.negative
    with _own_randomness():
        noise = comfy.sample.prepare_noise(latent, config.seed)
        return comfy.sample.sample(
            model, noise, config.steps, config.cfg, config.sampler, config.scheduler,
            config.positive, negative, latent, disable_pbar=True, seed=config.seed,
        )  # fmt: skip


def decode(model: Any, config: PreviewConfig, latent: Tensor) -> list[Image.Image]:
    """The frames of a sampled latent: by the VAE, else as ComfyUI's previews show latents."""
    if config.vae is not None:
        images = config.vae.decode(latent)
        frames = images.reshape(-1, *images.shape[-3:]).float().cpu()
        arrays = (frames.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(array) for array in arrays]
    wanted = model.get_model_object("latent_format")
    if wanted.latent_rgb_factors is None:
        raise AdapterLabError(
            "The latents of this model have no known colours", fix="Connect a VAE to the preview"
        )
    previewer = latent_preview.Latent2RGBPreviewer(
        wanted.latent_rgb_factors,
        wanted.latent_rgb_factors_bias,
        getattr(wanted, "latent_rgb_factors_reshape", None),
    )
    # Previews of a sampler see latents as the network does.
    rough = previewer.decode_latent_to_preview(model.model.process_latent_in(latent.cpu()).float())
    size = (config.width, config.height)
    return [Image.fromarray(np.asarray(rough)).resize(size, Image.Resampling.BICUBIC)]


def _zeroed(conditioning: Any) -> list[Any]:
    """The conditioning with zeros for text, as ConditioningZeroOut gives it."""
    return [
        [
            torch.zeros_like(cond) if isinstance(cond, Tensor) else cond,
            {
                k: torch.zeros_like(v) if k in ("pooled_output", "conditioning_lyrics") else v
                for k, v in extra.items()
            },
        ]
        for cond, extra in conditioning
    ]


@contextmanager
def _own_randomness() -> Iterator[None]:
    """ComfyUI seeds the global generators, and some samplers draw from them: they are put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
