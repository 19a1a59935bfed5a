"""What the training loop costs beside its model, and what checkpointing by block saves.

The model is the stack of ``steps.py`` with LoRAs, at 256 tokens: a step of a real one takes longer,
of which the shares are smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.ema import Tracker
from adapter_lab.core.train.loop import train
from adapter_lab.core.train.objective import Objective
from adapter_lab.core.train.optim import Optimizer
from adapter_lab.core.train.process import Flow
from adapter_lab.core.train.progress import Progress
from steps import WIDTH, Model, adapters, chain, saved, weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STEPS, CHANNELS, SIDE, DEEP, TOKENS = 10, 16, 16, 24, 256


class Stack:
    """A process whose network is ``model`` on (tokens, ``WIDTH``)."""

    noise, half = Flow(), False

    def __init__(self, model: Model) -> None:
        self.model = model

    def latents(self, items: Sequence[TrainItem]) -> Tensor:
        return torch.stack([item.latent for item in items])

    def corrupt(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(x0, noise, sigma.reshape(-1, 1, 1, 1))

    def target(self, x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - x0) / sigma.reshape(-1, 1, 1, 1)

    def predict(
        self, x_t: Tensor, sigma: Tensor, items: Sequence[TrainItem], t: Tensor,
        number: int | None = None,
    ) -> Tensor:  # fmt: skip
        rows = x_t.flatten(2).transpose(1, 2)
        y = self.model(rows.repeat(1, 1, WIDTH // CHANNELS))
        return y[..., :CHANNELS].transpose(1, 2).reshape(x_t.shape)


@contextmanager
def _clocked(spent: dict[str, float], name: str, owner: Any, method: str) -> Iterator[None]:
    """Add up in ``spent`` the seconds within a method."""
    whole = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return whole(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    with patch.object(owner, method, timed):
        yield


def _shares() -> dict[str, float]:
    """Seconds of a step, of what in it is no forward, backward or optimizer, and of the EMAs."""
    made = adapters("lora16", matrices := weights())
    names = {f"diffusion_model.layers.{i}": a for i, a in enumerate(made)}
    optimizer = Optimizer(names, OptimizerConfig())
    items = [TrainItem(torch.randn(CHANNELS, SIDE, SIDE), None) for _ in range(4)]
    job = (
        Stack(chain(made, matrices)), names, TrainDataset(items), TrainConfig(STEPS), Objective(),
        optimizer, Progress(),
    )  # fmt: skip
    spent: dict[str, float] = {}
    with (
        _clocked(spent, "model", Stack, "predict"),
        _clocked(spent, "model", Tensor, "backward"),
        _clocked(spent, "model", Optimizer, "step"),
        _clocked(spent, "averages", Tracker, "update"),
    ):
        start = time.perf_counter()
        train(*job, lambda _: None, Tracker(optimizer.factors))
        spent["step"] = time.perf_counter() - start
    spent["overhead"] = spent["step"] - spent["model"]
    return {name: seconds / STEPS for name, seconds in spent.items()}


def _share(part: str) -> Callable[..., None]:
    def bench(measure: Callable[..., None]) -> None:
        torch.set_num_threads(2)
        last: dict[str, float] = {}

        def run() -> float:
            last.update(_shares())
            return last[part]

        measure(run, lambda: last["step"], "the whole step", "s/step", 3)

    return bench


def _checkpointed(measure: Callable[..., None]) -> None:
    """Bytes kept by ``DEEP`` blocks at most, with and without checkpointing by block: with it, the
    input of each block and, once the backward pass has come to one, what that keeps."""
    made = adapters("lora16", matrices := weights(4))
    model, own = chain(made, matrices), [*matrices, *(t for a in made for t in a.trained.values())]
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return x + F.gelu(model(x))

    def run(x: Tensor, by_block: bool) -> Tensor:
        for _ in range(DEEP):
            x = checkpoint(block, x, use_reentrant=False) if by_block else block(x)
        return x

    one = saved(block, own, x)
    mine, theirs = (saved(partial(run, by_block=by_block), own, x) for by_block in (True, False))
    measure(lambda: mine + one, lambda: theirs, "without checkpointing", "bytes", 1)


BENCHES: dict[str, Callable[..., None]] = {
    "step_overhead": _share("overhead"),
    "step_averages": _share("averages"),
    "step_checkpointed": _checkpointed,
}
