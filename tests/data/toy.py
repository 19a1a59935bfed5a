"""A training run without a model worth the name: linear layers between channels, on noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.draw import Draw
from adapter_lab.core.adapters.training import make
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.ema import Tracker
from adapter_lab.core.train.loop import train
from adapter_lab.core.train.objective import Objective
from adapter_lab.core.train.optim import Optimizer
from adapter_lab.core.train.process import Flow
from adapter_lab.core.train.progress import Progress
from adapter_lab.core.train.random import generator

PATHS = ("diffusion_model.blocks.0.proj", "diffusion_model.blocks.1.proj", "clip_l.proj")
_EVERY = AdapterConfig(rank=4, alpha=4, scalar=True, dora=True, bias=True, tucker=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Toy:
    """A velocity model: one layer after the other, plus the item's conditioning."""

    half, noise = False, Flow()

    def __init__(self, adapters, channels=4):
        rng, self.adapters = torch.Generator().manual_seed(1), adapters
        self.weights = {
            p: torch.randn(channels, channels, generator=rng) / channels**0.5 * 1.5 for p in PATHS
        }

    def latents(self, items):
        return torch.stack([item.latent for item in items])

    def corrupt(self, x0, noise, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise

    def target(self, x0, x_t, sigma):
        return (x_t - x0) / sigma.view(-1, 1, 1, 1)

    def predict(self, x_t, sigma, items, t, number=None):
        h = x_t.flatten(2).mT
        for path, weight in self.weights.items():
            h = h if path == PATHS[0] else torch.tanh(h)
            adapter, y = self.adapters.get(path), F.linear(h, weight)
            if adapter is not None and number is not None:
                adapter = adapter.drawn(Draw(generator(0, path, number), t))
            h = y if adapter is None else y + adapter.bypass(h, Op(), weight, y)
        told = torch.stack([item.cond.mean(0) for item in items])[:, :, None, None]
        return h.mT.reshape(x_t.shape) + told


def dataset(count=5, channels=4, **more):
    """Items of two latent shapes."""
    rng = torch.Generator().manual_seed(2)
    items = []
    for i in range(count):
        latent = torch.randn(channels, 4, 4 + i % 2, generator=rng)
        items.append(TrainItem(latent, torch.randn(3, channels, generator=rng), **more))
    return TrainDataset(items)


def fresh(seed=0, channels=4, paths=PATHS, **config):
    """Adapters whose factors can be trained."""
    settings = AdapterConfig(**{"rank": 2, "alpha": 2.0, **config})
    adapters = {path: make((channels, channels), settings, generator(seed, path)) for path in paths}
    for path, adapter in adapters.items():
        dtype = DTYPES[settings.precision]
        leaves = {name: t.to(dtype, copy=True) for name, t in adapter.tensors.items()}
        adapters[path] = adapter.on(leaves)
        for factor in adapters[path].trained.values():
            factor.requires_grad_()
    return adapters


def mixed(dtype=torch.float32):
    """Factors of 0 to 4 axes."""
    shapes = {"conv": (8, 6, 3, 3), "linear": (8, 6), "norm": (8,)}
    adapters = {
        name: make(shape, _EVERY, generator(0, name), biased=True) for name, shape in shapes.items()
    }
    turn = AdapterConfig("boft", rank=2, rescale=True)
    adapters["turn"] = make((8, 8), turn, generator(0, "turn"))
    for name, adapter in adapters.items():
        if adapter.needs_weight_to_start:
            adapter = adapter.started(torch.randn(shapes[name]))
        leaves = {k: t.to(dtype, copy=True) for k, t in adapter.tensors.items()}
        adapters[name] = adapter.on(leaves)
        for factor in adapters[name].trained.values():
            factor.requires_grad_()
    return adapters


def updated(optimizer, steps, factors=None):
    """Steps with gradients that depend on the step and the factors only."""
    factors = factors or optimizer.factors
    for step in range(steps):
        for i, factor in enumerate(factors):
            noise = torch.randn(factor.shape, generator=generator(1, "gradient", step, i))
            factor.grad = (noise + factor.detach()).to(factor.dtype)
        optimizer.step(step, steps) if isinstance(optimizer, Optimizer) else optimizer.step()
    return factors


def copies(factors):
    """Leaves of the same values."""
    return [f.detach().clone().requires_grad_() for f in factors]


class Run:
    """One run, which may go on where another one stopped."""

    def __init__(self, settings=None, channels=4, seed=0, adapters=None, **adapter):
        self.adapters = adapters or fresh(seed, channels, **adapter)
        self.settings = settings or OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
        self.optimizer, self.progress = Optimizer(self.adapters, self.settings), Progress()
        self.trackers, self.steps = Tracker(self.optimizer.factors), []
        self.data = dataset(channels=channels)
        self.process = Toy(self.adapters, channels)

    def train(self, until, on_step=None, objective=None, steps=None, **config):
        """Until the step ``until`` of ``steps``, or of as many."""

        class Stop(BaseException):
            pass

        def told(step):
            self.steps.append(step)
            if on_step:
                on_step(step)
            if step.step == until:
                raise Stop

        settings = TrainConfig(steps or until, **{"batch_size": 2, **config})
        try:
            train(
                self.process, self.adapters, self.data, settings, objective or Objective(),
                self.optimizer, self.progress, told, self.trackers,
            )  # fmt: skip
        except Stop:
            self.optimizer.clear()
        return self

    def tensors(self):
        """Every tensor that a file would hold, and the averages."""
        factors = [t for p in sorted(self.adapters) for t in self.adapters[p].tensors.values()]
        return [*factors, *(t for ts in self.trackers.states.values() for t in ts)]
