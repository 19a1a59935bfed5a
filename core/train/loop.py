"""The training loop over a callable model; knows neither ComfyUI nor files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..errors import AdapterLabError
from . import gradients
from .config import TrainConfig
from .data import TrainDataset
from .ema import Tracker
from .objective import Objective
from .optim import Optimizer
from .process import Process
from .progress import Progress
from .random import generator

VALIDATION_SIGMAS = 4
HALF_SCALE = 2.0**16
_WINDOW = 20  # steps whose median loss is compared: single ones are weighted up to a million fold
# Times the first loss. One step at the harmless end of the schedule has a hundredth of the mean.
_BLOWN_UP = 1000.0
_EARLIER = "Lower the learning rate and go on from an earlier checkpoint"


class Diverged(AdapterLabError):
    """Loss or gradient are no finite numbers, or the loss has left all bounds.

    The factors of training are then of no use, although they may be finite.
    """


@dataclass(frozen=True)
class Step:
    """What one step was like.

    Attributes:
        step: completed steps, this one included.
        loss: mean over the batches of the step.
        rate: learning rate. norm: of the gradient before clipping.
        t: noise level of each item, 1 is pure noise.
        seconds: it took.
        idle: of the first step whose loss is not 0, the modules that it taught nothing.
    """

    step: int
    loss: float
    rate: float
    norm: float
    t: list[float]
    seconds: float
    idle: tuple[str, ...] = ()


def train(
    process: Process,
    adapters: Mapping[str, Algorithm],
    dataset: TrainDataset,
    config: TrainConfig,
    objective: Objective,
    optimizer: Optimizer,
    progress: Progress,
    on_step: Callable[[Step], None],
    trackers: Tracker | None = None,
    until: int | None = None,
) -> None:
    """Run optimiser steps ``progress.step`` .. ``until`` or ``config.steps``, in place.

    An exception before an update (cancel, no memory, data that can't be used) leaves factors,
    moments and ``progress`` as they were after the last completed step.

    Raises:
        Diverged: loss or gradient are not finite, or the loss has left all bounds.
        AdapterLabError: the first step of any loss gives modules no gradient, or only zeros.
    """
    progress.scale = progress.scale or (HALF_SCALE if process.half else 1.0)
    run = _Run(process, adapters, dataset, config, objective, optimizer, progress, trackers)
    while progress.step < (config.steps if until is None else until):
        step = run.step()
        if step is not None:
            on_step(step)
    optimizer.clear()


@dataclass(frozen=True)
class _Run:
    """What a step needs."""

    process: Process
    adapters: Mapping[str, Algorithm]
    dataset: TrainDataset
    config: TrainConfig
    objective: Objective
    optimizer: Optimizer
    progress: Progress
    trackers: Tracker | None

    def step(self) -> Step | None:
        """One update; None where the loss was scaled too high and the step has to be repeated."""
        since, number, progress = time.perf_counter(), self.progress.step, self.progress
        optimizer, steps = self.optimizer, self.config.steps
        optimizer.clear()
        total, levels = self.backward()
        found = gradients.lengths(optimizer.factors, progress.scale)
        length = gradients.joint(found)
        # The one time a step waits for the GPU.
        loss, norm = gradients.numbers(torch.stack([total.to(length), length]))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if math.isfinite(loss) and progress.scale > 1:
                progress.scale /= 2
                return None
            raise _diverged(gradients.infinite(self.adapters, found), number, loss, norm)
        _require_bounds(progress)
        idle = gradients.idle(self.adapters, found) if self.tells(loss) else ()
        gradients.shorten(optimizer.factors, norm, optimizer.config.clip)
        rate = optimizer.rate(number, steps)
        optimizer.step(number, steps)
        if self.trackers is not None:
            self.trackers.update(optimizer.factors, number + 1)
        progress.step = number + 1
        progress.losses.append(loss)
        drawn = [value for level in levels for value in gradients.numbers(level)]
        return Step(number + 1, loss, rate, norm, drawn, time.perf_counter() - since, idle)

    def tells(self, loss: float) -> bool:
        """Whether this is the first step that shows what modules learn: one whose items have some
        weight, unless none has."""
        earlier = self.progress.losses
        return not any(earlier) and (loss != 0 or len(earlier) + 1 == len(self.dataset))

    def backward(self) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward of all batches of a step; the mean of their losses, and their noise
        levels."""
        total, levels = torch.zeros(()), list[Tensor]()
        count, seed, done = self.config.accumulation, self.config.seed, self.progress.step
        for number in range(done * count, (done + 1) * count):
            items = self.dataset.draw(number, self.config.batch_size, seed)
            rng = generator(seed, "noise", number)
            losses = self.objective.losses(self.process, items, rng, number)
            loss = losses.values.mean() / count
            if loss.requires_grad:
                (loss * self.progress.scale).backward()  # pyright: ignore[reportUnknownMemberType]
            elif not any(adapter.draws for adapter in self.adapters.values()):
                raise AdapterLabError(
                    "None of the chosen modules takes part in the model's computation",
                    fix="Choose other targets",
                )
            total = total.to(loss.device) + loss.detach()
            levels.append(losses.t)
        return total, levels


def _require_bounds(progress: Progress) -> None:
    """Stop a run whose loss grows without becoming infinite."""
    losses = progress.losses
    if not losses or len(losses) % _WINDOW:
        return
    first, last = next(filter(None, losses), 0.0), median(losses[-_WINDOW:])
    if last > _BLOWN_UP * first > 0:
        raise Diverged(
            f"Training diverged: the loss is {last / first:.0f} times what it was",
            found=f"{last:.4g} up to step {progress.step}",
            expected=f"about {first:.4g}, as at first",
            fix=_EARLIER,
        )


def _diverged(bad: Sequence[str], step: int, loss: float, norm: float) -> Diverged:
    where = f", not finite in {gradients.listed(bad)}" if bad and math.isfinite(loss) else ""
    return Diverged(
        f"Training diverged at step {step + 1}",
        found=f"loss {loss}, length of the gradient {norm}{where}",
        fix=_EARLIER if step else "Check that model and data belong together",
    )


@torch.no_grad()
def validate(process: Process, dataset: TrainDataset, objective: Objective, seed: int) -> float:
    """Mean loss over all items at fixed noise and fixed fractions of the schedule.

    The same model and dataset give the same number at any time, so a curve of it is comparable
    from start to end and between runs.
    """
    losses: list[float] = []
    for i, item in enumerate(dataset):
        for j in range(VALIDATION_SIGMAS):
            u = (j + 0.5) / VALIDATION_SIGMAS
            rng = generator(seed, "validation", i, j)
            losses.append(objective.fixed(process, item, u, rng).item())
    return sum(losses) / len(losses)
