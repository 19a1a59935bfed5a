"""How training draws its noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterLabError
from .process import Noise, shifted

# Models are sampled with shifts of up to 12, so that few steps lie where the picture is decided.
# Trainers use 2 to 7 for the same models: fine detail is learned below t = 0.5, which a
# logit-normal shifted by 5 draws once in 20 times, by 12 once in 150.
_LARGEST_SHIFT = 5.0
# Draws in vain after which a range counts as never met.
_ATTEMPTS = 1000
RANGES = ("rescale", "reject")


@dataclass(frozen=True)
class Resolution:
    """A shift whose logarithm is linear in the number of tokens, as a model samples with.

    Args:
        low, high: (tokens, log of the shift) of two points.
        patch: side of a token in latent pixels.
    """

    low: tuple[int, float]
    high: tuple[int, float]
    patch: int

    def shift(self, size: tuple[int, int]) -> float:
        """Shift of a latent of (height, width)."""
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        (x1, y1), (x2, y2) = self.low, self.high
        return math.exp(y1 + (tokens - x1) * (y2 - y1) / (x2 - x1))


# Of the samplers of Flux, Flux 2, Qwen-Image and Krea 2 (defaults of musubi-tuner too).
RESOLUTIONS = {
    "flux_shift": Resolution((256, 0.5), (4096, 1.15), 2),
    "flux2_shift": Resolution((256, 0.5), (4096, 1.15), 1),
    "qwen_shift": Resolution((256, 0.5), (8192, 0.9), 2),
    "krea2_shift": Resolution((256, 0.5), (6400, 1.15), 2),
}


@dataclass(frozen=True)
class Timesteps:
    """A distribution of noise levels t in (0, 1), 1 pure noise.

    Args:
        sampling: a key of ``SAMPLINGS``.
        mean, std: of the normal number; every sampling with a sigmoid has a ``std``, which other
            trainers call sigmoid_scale.
        shift: k of "shift".
        mode_scale: s of "mode".
        low, high: least and greatest level.
        limit: how the range is kept: "rescale" squeezes all levels into it, "reject" draws those
            outside again, so that the shape of the distribution stays.
    """

    sampling: str = "auto"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0
    mode_scale: float = 1.29
    low: float = 0.0
    high: float = 1.0
    limit: str = "rescale"

    def draw(self, noise: Noise, size: tuple[int, int], count: int, rng: torch.Generator) -> Tensor:
        """(count,) levels for latents of (height, width).

        Raises:
            AdapterLabError: the sampling means nothing for the model, or "reject" finds nothing.
        """
        self.require(noise)
        if self.limit == "rescale":
            t = self.low + (self.high - self.low) * self._free(noise, size, count, rng)
        else:
            t = self._within(noise, size, count, rng)
        return t.clamp(noise.margin, 1 - noise.margin)

    def require(self, noise: Noise) -> None:
        """Refuse what means nothing for the model."""
        if self.sampling in RESOLUTIONS and noise.kind != "flow":
            raise AdapterLabError(
                f"Timestep sampling '{self.sampling}' is for flow models",
                found=f"a model that predicts {noise.kind}",
                fix="Set 'timestep_sampling' to auto or uniform",
            )

    def _free(
        self, noise: Noise, size: tuple[int, int], count: int, rng: torch.Generator
    ) -> Tensor:
        u, z = torch.rand(count, generator=rng), torch.randn(count, generator=rng)
        if self.sampling in RESOLUTIONS:
            return shifted(_sigmoid(self, z), RESOLUTIONS[self.sampling].shift(size))
        return SAMPLINGS[self.sampling](self, noise, u, z)

    def _within(
        self, noise: Noise, size: tuple[int, int], count: int, rng: torch.Generator
    ) -> Tensor:
        kept = torch.empty(0)
        for _ in range(_ATTEMPTS):
            t = self._free(noise, size, max(count, 64), rng)
            kept = torch.cat([kept, t[(self.low <= t) & (t <= self.high)]])
            if len(kept) >= count:
                return kept[:count]
        raise AdapterLabError(
            "Next to no timestep falls into the range",
            found=f"{len(kept)} of {_ATTEMPTS * max(count, 64)} between {self.low} and {self.high}",
            fix="Widen the range, or set 'timestep_range' to rescale",
        )


def _sigmoid(steps: Timesteps, z: Tensor) -> Tensor:
    return torch.sigmoid(steps.std * z)


def _auto(_steps: Timesteps, noise: Noise, u: Tensor, z: Tensor) -> Tensor:
    """Logit-normal with the model's own shift, up to a limit, for flows (Esser et al. 2024, section
    3.1), else every timestep equally often (Ho et al. 2020, algorithm 1)."""
    return shifted(z.sigmoid(), min(noise.shift, _LARGEST_SHIFT)) if noise.kind == "flow" else u


def _schedule(_steps: Timesteps, noise: Noise, u: Tensor, _z: Tensor) -> Tensor:
    """What a sampler of many steps visits on this model."""
    return noise.scheduled(u)


def _uniform(_steps: Timesteps, _noise: Noise, u: Tensor, _z: Tensor) -> Tensor:
    """Every level equally often."""
    return u


def _logit_normal(steps: Timesteps, _noise: Noise, _u: Tensor, z: Tensor) -> Tensor:
    """Sigmoid of a normal number (Esser et al. 2024, equation 19); a positive mean favours noise.

    sd-scripts and diffusers read the level from the other end, so that it favours data there.
    """
    return torch.sigmoid(steps.mean + steps.std * z)


def _scaled_sigmoid(steps: Timesteps, _noise: Noise, _u: Tensor, z: Tensor) -> Tensor:
    """Sigmoid of a centred normal number (sd-scripts: "sigmoid", with its sigmoid_scale)."""
    return _sigmoid(steps, z)


def _shift(steps: Timesteps, _noise: Noise, _u: Tensor, z: Tensor) -> Tensor:
    """The same, its odds multiplied by the shift (sd-scripts: "shift")."""
    return shifted(_sigmoid(steps, z), steps.shift)


def _mode(steps: Timesteps, _noise: Noise, u: Tensor, _z: Tensor) -> Tensor:
    """More of the middle for s > 0, of the ends for s < 0 (Esser et al. 2024, equation 20)."""
    return 1 - u - steps.mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def _logsnr(steps: Timesteps, noise: Noise, _u: Tensor, z: Tensor) -> Tensor:
    """A normal logarithm of the signal to noise ratio (Karras et al. 2022, section 5: log sigma
    is minus half of it); a positive mean favours data."""
    return noise.level(torch.exp(steps.mean + steps.std * z))


Sampling = Callable[[Timesteps, Noise, Tensor, Tensor], Tensor]
SAMPLINGS: dict[str, Sampling] = {
    "auto": _auto,
    "schedule": _schedule,
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "sigmoid": _scaled_sigmoid,
    "shift": _shift,
    "mode": _mode,
    "logsnr": _logsnr,
}
NAMES = (*SAMPLINGS, *RESOLUTIONS)
