"""How much the loss at each noise level counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterLabError
from .process import Noise

# Where the noise vanishes the ratio is unbounded; sd-scripts limits it there.
_LARGEST_SNR = 1000.0


def _none(_noise: Noise, t: Tensor, _gamma: float) -> Tensor:
    """1: of a flow the velocity's error, of EDM the weights of Karras et al. (2022, table 1)."""
    return torch.ones_like(t)


def _min_snr(noise: Noise, t: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) on the error of the clean latent (Hang et al. 2023, "Efficient Diffusion
    Training via Min-SNR Weighting", section 3.4), in terms of what the network says:
    min(SNR, gamma) / SNR for noise, / (SNR + 1) for v, min((1 - t)^2, gamma t^2) for a flow."""
    return noise.snr(t).clamp(max=gamma) * noise.gain(t).square()


def _debiased(noise: Noise, t: Tensor, _gamma: float) -> Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2023, "Unmasking Bias in Diffusion Model Training",
    section 4), 1 / (SNR + 1) for v (sd-scripts, --debiased_estimation_loss)."""
    snr = noise.snr(t).clamp(max=_LARGEST_SNR)
    return snr.rsqrt() if noise.kind == "eps" else 1 / (snr + 1)


def _sigma_sqrt(_noise: Noise, t: Tensor, _gamma: float) -> Tensor:
    """t^-2 (diffusers and musubi-tuner, weighting_scheme "sigma_sqrt")."""
    return t**-2.0


def _cosmap(_noise: Noise, t: Tensor, _gamma: float) -> Tensor:
    """2 / (pi (1 - 2 t + 2 t^2)) (Esser et al. 2024, equation 21)."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


@dataclass(frozen=True)
class Weighting:
    """A weight of each noise level.

    Args:
        function: (noise, t (b,), gamma) -> (b,).
        kinds: what the network may say, as in :class:`Noise`.
    """

    function: Callable[[Noise, Tensor, float], Tensor]
    kinds: tuple[str, ...] = ("flow", "eps", "v", "edm", "x0")


WEIGHTINGS = {
    "none": Weighting(_none),
    "min_snr": Weighting(_min_snr),
    "debiased": Weighting(_debiased, ("eps", "v", "edm")),
    "sigma_sqrt": Weighting(_sigma_sqrt, ("flow",)),
    "cosmap": Weighting(_cosmap, ("flow",)),
}


def require(name: str, noise: Noise) -> None:
    """Refuse a weighting that is not defined for what the network says."""
    kinds = WEIGHTINGS[name].kinds
    if noise.kind not in kinds:
        raise AdapterLabError(
            f"Weighting '{name}' is not defined for this model",
            found=f"a model that predicts {noise.kind}",
            expected=" or ".join(kinds),
            fix="Set 'weighting' to none or min_snr",
        )


def weights(name: str, noise: Noise, t: Tensor, gamma: float) -> Tensor:
    """Weight of each level ``t``, (b,)."""
    return WEIGHTINGS[name].function(noise, t, gamma)
