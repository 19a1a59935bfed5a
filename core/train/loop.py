"""The training loop over a callable model; knows neither ComfyUI nor files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from .config import OptimizerConfig, TrainConfig
from .data import TrainDataset, TrainItem
from .random import generator

VALIDATION_SIGMAS = 4
HALF_SCALE = 2.0**16


class Process(Protocol):
    """The diffusion process of the model in training; the host supplies it.

    Latents are (b, c, *space) in the model's latent format, sigmas (b,).
    """

    def latents(self, items: Sequence[TrainItem]) -> Tensor:
        """Clean latents of ``items`` on the model's device, as the network sees them."""
        ...

    def sigmas(self, u: Tensor) -> Tensor:
        """Noise levels at the fractions ``u`` in (0, 1) of the model's own schedule."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of the forward process."""
        ...

    def target(self, x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say to ``x_t``: noise, v or velocity, as it was trained."""
        ...

    def predict(self, x_t: Tensor, sigma: Tensor, items: Sequence[TrainItem]) -> Tensor:
        """What the network says, conditioned on each item's own conditioning."""
        ...

    @property
    def half(self) -> bool:
        """Whether it computes in float16, whose small gradients vanish unless scaled up."""
        ...


@dataclass
class Progress:
    """Where a run is: everything a resumed run needs besides factors and moments.

    Attributes:
        step: completed optimiser steps.
        losses: training loss of each completed step.
        validation: (step, held-out loss).
        scale: the loss is multiplied by it for the backward pass (Micikevicius et al. 2018,
            "Mixed Precision Training", section 3.2), halved when gradients overflow; 0 before the
            first step.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list[float])
    validation: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    scale: float = 0.0


def parameters(adapters: Mapping[str, Algorithm]) -> list[Tensor]:
    """The factors of all adapters in a fixed order; the scale is never among them."""
    return [t for name in sorted(adapters) for t in adapters[name].tensors.values()]


def make_optimizer(
    adapters: Mapping[str, Algorithm], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimiser over all factors."""
    return torch.optim.AdamW(
        parameters(adapters), lr=config.learning_rate, weight_decay=config.weight_decay
    )


def train(
    process: Process,
    adapters: Mapping[str, Algorithm],
    dataset: TrainDataset,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    settings: OptimizerConfig,
    progress: Progress,
    on_step: Callable[[Progress], None],
) -> None:
    """Run optimiser steps ``progress.step`` .. ``config.steps``, in place.

    An exception before an update (cancel, no memory, data that can't be used) leaves factors,
    moments and ``progress`` as they were after the last completed step.

    Raises:
        AdapterLabError: loss or gradient are not finite, or no factor has a gradient.
    """
    factors = parameters(adapters)
    progress.scale = progress.scale or (HALF_SCALE if process.half else 1.0)
    while progress.step < config.steps:
        optimizer.zero_grad(set_to_none=True)
        loss = sum(
            _accumulate(process, dataset, config, progress, i) for i in range(config.accumulation)
        )
        norm = _norm(factors, settings.clip, progress.scale)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if math.isfinite(loss) and progress.scale > 1:
                progress.scale /= 2
                continue
            raise _diverged(progress.step, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(progress.step)
        optimizer.step()
        progress.step += 1
        progress.losses.append(loss)
        on_step(progress)
    optimizer.zero_grad(set_to_none=True)


def _accumulate(
    process: Process, dataset: TrainDataset, config: TrainConfig, progress: Progress, part: int
) -> float:
    """Forward and backward of one batch; returns its share of the step's loss."""
    number = progress.step * config.accumulation + part
    items = [dataset[i] for i in dataset.batch(number, config.batch_size, config.seed)]
    rng = generator(config.seed, "noise", number)
    u = torch.rand(len(items), generator=rng)
    loss = _losses(process, items, u, rng).mean() / config.accumulation
    if not loss.requires_grad:
        raise AdapterLabError(
            "None of the chosen modules takes part in the model's computation",
            fix="Choose other targets",
        )
    (loss * progress.scale).backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.item()


def _norm(factors: Sequence[Tensor], clip: float, scale: float) -> float:
    """Undo the loss scale, shorten the gradient to ``clip``; its length before that."""
    for factor in factors:
        if factor.grad is not None and scale != 1:
            factor.grad /= scale
    return float(torch.nn.utils.clip_grad_norm_(factors, clip or math.inf))


def _diverged(step: int, loss: float, norm: float) -> AdapterLabError:
    fix = "Lower the learning rate; the state before this step is kept"
    return AdapterLabError(
        f"Training diverged at step {step + 1}",
        found=f"loss {loss}, length of the gradient {norm}",
        fix=fix if step else "Check that model and data belong together",
    )


def _losses(
    process: Process, items: Sequence[TrainItem], u: Tensor, rng: torch.Generator
) -> Tensor:
    """Weighted squared error of each item, (b,), in the model's own parameterisation."""
    x0 = process.latents(items)
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    sigma = process.sigmas(u).to(x0)
    x_t = process.corrupt(x0, noise, sigma)
    error = (process.predict(x_t, sigma, items) - process.target(x0, x_t, sigma)).float().square()
    masks = [item.mask for item in items]
    if any(mask is not None for mask in masks):
        error = error * torch.stack([_mask(mask, error) for mask in masks])
    weight = torch.tensor([item.weight for item in items], device=error.device)
    return error.flatten(1).mean(1) * weight


def _mask(mask: Tensor | None, error: Tensor) -> Tensor:
    """``mask`` at the size of the latent, broadcastable over one item's error (c, *space)."""
    size = error.shape[-2:]
    if mask is None:
        mask = torch.ones(1, 1)
    small = F.interpolate(mask[None, None].to(error), size=size, mode="area")[0, 0]
    return small.reshape(1, *(1,) * (error.ndim - 4), *size)


@torch.no_grad()
def validate(process: Process, dataset: TrainDataset, seed: int) -> float:
    """Mean loss over all items at fixed noise and fixed fractions of the schedule.

    The same model and dataset give the same number at any time, so a curve of it is comparable
    from start to end and between runs.
    """
    losses: list[float] = []
    for i, item in enumerate(dataset):
        for j in range(VALIDATION_SIGMAS):
            u = torch.tensor([(j + 0.5) / VALIDATION_SIGMAS])
            rng = generator(seed, "validation", i, j)
            losses.append(_losses(process, [item], u, rng).item())
    return sum(losses) / len(losses)
