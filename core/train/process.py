"""The diffusion process that is trained: what the objective asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .data import TrainItem


class Noise(Protocol):
    """How a model goes from data to noise, and what its network says on the way.

    The noise level t, (b,), runs from 0 (data) to 1 (noise): the time of a flow, otherwise the
    place in the model's table of sigmas, for most the fraction of 1000 training timesteps.

    Attributes:
        kind: what the network says: velocity ("flow"), noise ("eps"), v ("v"), v with the other
            sign ("edm") or the clean latent ("x0").
        shift: the k of t' = k t / (1 + (k - 1) t) that the model samples with, 1 for none.
        margin: levels nearer than that to 0 or 1 have no meaning.
    """

    kind: str
    shift: float
    margin: float

    def scheduled(self, u: Tensor) -> Tensor:
        """Noise level at ``u`` in (0, 1) of the model's own sampling schedule, rising."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """The model's own sigma at a noise level."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise ratio: alpha^2 / sigma^2."""
        ...

    def level(self, snr: Tensor) -> Tensor:
        """The noise level of a signal to noise ratio."""
        ...

    def gain(self, t: Tensor) -> Tensor:
        """Length of the error of the clean latent per length of error of the output."""
        ...


class Process(Protocol):
    """The diffusion process of the model in training; the host supplies it.

    Latents are (b, c, *space) in the model's latent format, sigmas (b,).
    """

    noise: Noise

    def latents(self, items: Sequence[TrainItem]) -> Tensor:
        """Clean latents of ``items`` on the model's device, as the network sees them."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of the forward process."""
        ...

    def target(self, x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say to ``x_t``: noise, v or velocity, as it was trained."""
        ...

    def predict(
        self,
        x_t: Tensor,
        sigma: Tensor,
        items: Sequence[TrainItem],
        t: Tensor,
        number: int | None = None,
    ) -> Tensor:
        """What the network says, conditioned on each item's own conditioning.

        Args:
            t: (b,) noise levels in (0, 1), 1 pure noise, on the CPU.
            number: of the batch, for what the adapters draw; None: they draw nothing.
        """
        ...

    @property
    def half(self) -> bool:
        """Whether it computes in float16, whose small gradients vanish unless scaled up."""
        ...


class Flow:
    """A rectified flow x_t = (1 - t) x_0 + t s n whose network says s n - x_0 (Liu et al. 2022,
    "Flow Straight and Fast"). A :class:`Noise`.

    Args:
        shift: the model's own.
        scale: s, the standard deviation of its noise.
    """

    kind = "flow"
    margin = 1e-3

    def __init__(self, shift: float = 1.0, scale: float = 1.0) -> None:
        self.shift, self.scale = shift, scale

    def scheduled(self, u: Tensor) -> Tensor:
        """``u`` shifted towards noise."""
        return shifted(u, self.shift)

    def sigma(self, t: Tensor) -> Tensor:
        """The level itself."""
        return t

    def snr(self, t: Tensor) -> Tensor:
        """((1 - t) / (s t))^2."""
        return ((1 - t) / (self.scale * t)).square()

    def level(self, snr: Tensor) -> Tensor:
        """1 / (1 + s sqrt(snr))."""
        return 1 / (1 + self.scale * snr.sqrt())

    def gain(self, t: Tensor) -> Tensor:
        """t, as x_0 = x_t - t v."""
        return t


class VarianceFlow(Flow):
    """A flow told in x = x_0 + sigma n with sigma = t / (1 - t), as the Cosmos models are: their
    schedule is even in log sigma."""

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.ends = torch.tensor([sigma_min, sigma_max]).log()

    def scheduled(self, u: Tensor) -> Tensor:
        """Log sigma at ``u`` of its range, as a level."""
        return torch.lerp(self.ends[0], self.ends[1], u).sigmoid()

    def sigma(self, t: Tensor) -> Tensor:
        """t / (1 - t)."""
        return t / (1 - t)


class Table:
    """Noise levels from a table of sigmas of x = x_0 + sigma n, as of models that were trained on
    discrete timesteps. A :class:`Noise`.

    Args:
        kind: "eps", "v", "edm" or "x0".
        sigmas: rising.
        sigma_data: standard deviation of the data, of "v" and "edm" (Karras et al. 2022,
            "Elucidating the Design Space", table 1).
    """

    shift = 1.0

    def __init__(self, kind: str, sigmas: Tensor, sigma_data: float = 1.0) -> None:
        self.kind, self.sigma_data = kind, sigma_data
        self.sigmas = sigmas.detach().float().cpu().clone()
        self.margin = 0.5 / len(sigmas)

    def scheduled(self, u: Tensor) -> Tensor:
        """Each row equally often."""
        return u

    def sigma(self, t: Tensor) -> Tensor:
        """Sigma of the row at the fraction ``t``."""
        row = (t * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        return self.sigmas[row.cpu()].to(t)

    def snr(self, t: Tensor) -> Tensor:
        """1 / sigma^2."""
        return self.sigma(t) ** -2.0

    def level(self, snr: Tensor) -> Tensor:
        """The row whose sigma is the next above 1 / sqrt(snr)."""
        row = torch.searchsorted(self.sigmas, (snr**-0.5).cpu())
        return ((row + 0.5) / len(self.sigmas)).clamp(max=1 - self.margin).to(snr)

    def gain(self, t: Tensor) -> Tensor:
        """|d x_0 / d output|: sigma; sigma sigma_d / sqrt(sigma^2 + sigma_d^2); 1."""
        sigma = self.sigma(t)
        if self.kind == "eps":
            return sigma
        if self.kind == "x0":
            return torch.ones_like(sigma)
        return sigma * self.sigma_data / (sigma.square() + self.sigma_data**2).sqrt()


def shifted(t: Tensor, k: float) -> Tensor:
    """k t / (1 + (k - 1) t): the odds of noise times k (Esser et al. 2024, "Scaling Rectified
    Flow Transformers", equation 23, with k = sqrt(m / n))."""
    return k * t / (1 + (k - 1) * t)
