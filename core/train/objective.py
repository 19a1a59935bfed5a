"""What is minimised: at which noise levels, what error, with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import require_choice, require_range
from ..errors import AdapterLabError
from . import weighting
from .data import TrainItem
from .losses import LOSSES, SCHEDULES, element_losses
from .process import Noise, Process
from .timesteps import NAMES, RANGES, Timesteps

_CHOICES = {
    "timestep_sampling": NAMES,
    "timestep_range": RANGES,
    "weighting": tuple(weighting.WEIGHTINGS),
    "loss": tuple(LOSSES),
    "huber_schedule": tuple(SCHEDULES),
}
# Field -> least and greatest value. The curve of "mode" turns back outside of its bounds.
BOUNDS = {
    "mean": (-100.0, 100.0),
    "std": (0.0, 100.0),
    "shift": (0.001, 1000.0),
    "mode_scale": (-1.0, 1.75),
    "min_timestep": (0.0, 1.0),
    "max_timestep": (0.0, 1.0),
    "gamma": (0.001, 10_000.0),
    "huber_c": (1e-6, 1000.0),
    "unmasked_weight": (0.0, 1.0),
    "prior_weight": (0.0, 100.0),
    "noise_offset": (0.0, 1.0),
    "adaptive_noise_scale": (-10.0, 10.0),
    "input_perturbation": (0.0, 1.0),
    "guidance": (0.0, 100.0),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. The target is always what the network was trained to say.

    Args:
        timestep_sampling: a name of :data:`timesteps.NAMES`.
        mean, std, shift, mode_scale: of the sampling, see :class:`Timesteps`.
        min_timestep, max_timestep: range of the noise level, 1 is pure noise.
        timestep_range: "rescale" or "reject", see :class:`Timesteps`.
        weighting: a key of :data:`weighting.WEIGHTINGS`; gamma is that of min-SNR.
        loss: a key of :data:`losses.LOSSES`; huber_c and huber_schedule are those of the Huber
            and smooth L1 losses.
        unmasked_weight: least weight of a place in a masked item.
        prior_weight: weight of regularisation items.
        noise_offset: standard deviation of noise that is the same at all places of a channel.
        adaptive_noise_scale: adds this times the absolute mean of the channel to it.
        input_perturbation: noise on top of the noise that the target does not know of.
        guidance: told to models that embed it, where the conditioning does not say.
    """

    timestep_sampling: str = "auto"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0
    mode_scale: float = 1.29
    min_timestep: float = 0.0
    max_timestep: float = 1.0
    timestep_range: str = "rescale"
    weighting: str = "none"
    gamma: float = 5.0
    loss: str = "mse"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    unmasked_weight: float = 0.0
    prior_weight: float = 1.0
    noise_offset: float = 0.0
    adaptive_noise_scale: float = 0.0
    input_perturbation: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            require_choice(name, getattr(self, name), options)
        for name, (low, high) in BOUNDS.items():
            require_range(name, getattr(self, name), low, high)
        if self.min_timestep >= self.max_timestep:
            raise AdapterLabError(
                "The range of timesteps is empty",
                found=f"{self.min_timestep:g} to {self.max_timestep:g}",
                expected="min_timestep below max_timestep",
            )

    @property
    def timesteps(self) -> Timesteps:
        """The distribution of noise levels."""
        return Timesteps(
            self.timestep_sampling, self.mean, self.std, self.shift, self.mode_scale,
            self.min_timestep, self.max_timestep, self.timestep_range,
        )  # fmt: skip


class Losses(NamedTuple):
    """Of one batch.

    Attributes:
        values: (b,) weighted loss of each item, differentiable.
        t: (b,) noise level of each item in (0, 1).
    """

    values: Tensor
    t: Tensor


class Objective:
    """The loss of a batch as ``config`` says."""

    def __init__(self, config: ObjectiveConfig = ObjectiveConfig()) -> None:
        self.config = config

    def require(self, noise: Noise) -> None:
        """Refuse a sampling or weighting that means nothing for the model."""
        self.config.timesteps.require(noise)
        weighting.require(self.config.weighting, noise)

    def losses(
        self,
        process: Process,
        items: Sequence[TrainItem],
        rng: torch.Generator,
        number: int = 0,
    ) -> Losses:
        """Loss of each item at noise levels and noise drawn from ``rng``.

        Args:
            number: of the batch since the start of the run.

        Raises:
            AdapterLabError: as :meth:`require`.
        """
        config, noise = self.config, process.noise
        self.require(noise)
        x0 = process.latents(items)
        size = (x0.shape[-2], x0.shape[-1])
        t = config.timesteps.draw(noise, size, len(items), rng)
        added = self._noise(x0, rng)
        sigma = noise.sigma(t).to(x0)
        x_t = process.corrupt(x0, added, sigma)
        target = process.target(x0, x_t, sigma)
        if config.input_perturbation:
            # Ning et al. 2023, "Input Perturbation Reduces Exposure Bias", algorithm 1.
            more = config.input_perturbation * torch.randn(x0.shape, generator=rng).to(x0)
            x_t = process.corrupt(x0, added + more, sigma)
        said = process.predict(x_t, sigma, items, t, number)
        c = SCHEDULES[config.huber_schedule](noise, t, config.huber_c).to(x0)
        error = element_losses(config.loss, (said - target).float(), c)
        values = _means(error, items, config.unmasked_weight)
        scale = weighting.weights(config.weighting, noise, t, config.gamma)
        return Losses(values * (scale * self._prior(items)).to(values), t)

    def fixed(self, process: Process, item: TrainItem, u: float, rng: torch.Generator) -> Tensor:
        """Squared error of one item at the fraction ``u`` of the model's own schedule, (1,): the
        same number under every objective, so that runs can be compared."""
        t = process.noise.scheduled(torch.tensor([u])).clamp(
            process.noise.margin, 1 - process.noise.margin
        )
        x0 = process.latents([item])
        sigma = process.noise.sigma(t).to(x0)
        x_t = process.corrupt(x0, torch.randn(x0.shape, generator=rng).to(x0), sigma)
        said = process.predict(x_t, sigma, [item], t)
        return _means((said - process.target(x0, x_t, sigma)).float().square(), [item], 0.0)

    def _noise(self, x0: Tensor, rng: torch.Generator) -> Tensor:
        """Noise for ``x0``, with the offset that lets a model reach the brightness of a whole
        channel (Guttenberg 2023, "Diffusion with Offset Noise"; adaptive as in sd-scripts)."""
        noise = torch.randn(x0.shape, generator=rng).to(x0)
        config = self.config
        if not (config.noise_offset or config.adaptive_noise_scale):
            return noise
        channel = (*x0.shape[:2], *(1,) * (x0.ndim - 2))
        mean = x0.flatten(2).mean(2).abs().view(channel)
        offset = (config.noise_offset + config.adaptive_noise_scale * mean).clamp(min=0)
        return noise + offset * torch.randn(channel, generator=rng).to(x0)

    def _prior(self, items: Sequence[TrainItem]) -> Tensor:
        prior = self.config.prior_weight
        return torch.tensor([prior if item.regularisation else 1.0 for item in items])


def _means(error: Tensor, items: Sequence[TrainItem], least: float) -> Tensor:
    """Mean error of each item under its mask, times its weight, (b,)."""
    masks = [item.mask for item in items]
    if any(mask is not None for mask in masks):
        error = error * torch.stack([_mask(mask, error).clamp(min=least) for mask in masks])
    weight = torch.tensor([item.weight for item in items], device=error.device)
    return error.flatten(1).mean(1) * weight


def _mask(mask: Tensor | None, error: Tensor) -> Tensor:
    """``mask`` at the size of the latent, broadcastable over one item's error (c, *space)."""
    size = error.shape[-2:]
    if mask is None:
        mask = torch.ones(1, 1)
    small = F.interpolate(mask[None, None].to(error), size=size, mode="area")[0, 0]
    return small.reshape(1, *(1,) * (error.ndim - 4), *size)
