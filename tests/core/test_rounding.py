"""bfloat16 factors: nothing that is smaller than their resolution gets lost."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.optim import Optimizer
from adapter_lab.core.train.optimizers import OPTIMIZERS
from adapter_lab.core.train.random import generator
from adapter_lab.core.train.rounding import joined, split, stochastic
from toy import PATHS, fresh, updated


def test_a_float_is_its_halves():
    value = torch.randn(20_000) * torch.logspace(-37, 37, 20_000)
    value[:3] = torch.tensor([0.0, 1.00390625, -1.01171875])  # two of them in the middle
    upper, rest = split(value)
    assert torch.equal(joined(upper, rest), value) and rest.dtype == torch.int16
    nearest = (upper.double() - value.double()).abs()
    assert (nearest <= (value.bfloat16().double() - value.double()).abs()).all()


def test_stochastic_rounding_is_right_on_average():
    value = torch.full((200_000,), 1 + 0.3 / 128)
    found = stochastic(value, torch.Generator().manual_seed(0)).float()
    assert set(found.tolist()) == {1.0, 1 + 1 / 128}
    assert (found > 1).double().mean().item() == pytest.approx(0.3, abs=0.005)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic(exact.float(), torch.Generator()), exact)
    wild = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(stochastic(wild, torch.Generator())[:2], wild[:2].bfloat16())
    assert stochastic(wild, torch.Generator())[2].isnan()


def small_steps(rounding, size=1 << 14):
    """A bfloat16 factor of ones after 300 updates of 1e-5 each."""
    adapters = fresh(paths=PATHS[:1], algorithm="full", precision="bf16", channels=128)
    (factor,) = adapters[PATHS[0]].trained.values()
    with torch.no_grad():
        factor.fill_(1.0)
    config = OptimizerConfig(
        "SGD", 1e-5, 0.0, clip=0.0, rounding=rounding, arguments="momentum = 0.0"
    )
    optimizer = Optimizer(adapters, config)
    for step in range(300):
        factor.grad = torch.ones_like(factor)
        optimizer.step(step, 300)
    assert factor.numel() == size
    return factor.detach(), optimizer


def test_updates_below_the_resolution_are_not_lost():
    """0.003 of a resolution of 0.0039 below 1: rounding to the nearest would lose all of it."""
    assert (torch.ones(1).bfloat16() - 1e-5).item() == 1
    factor, _ = small_steps("stochastic")
    assert factor.float().mean().item() == pytest.approx(1 - 0.003, abs=1e-4)
    factor, optimizer = small_steps("kahan")
    exact = torch.ones(())
    for _ in range(300):
        exact -= 1e-5
    assert torch.equal(factor, exact.bfloat16().expand_as(factor))
    assert torch.equal(joined(factor, optimizer._rest[0]), exact.expand_as(factor))


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "ScheduleFreeAdamW", "Lion8bit"])
def test_kahan_is_float32_to_the_bit(name):
    """Under the same gradients bfloat16 factors are those of a float32 run, rounded."""
    rate = OPTIMIZERS[name].rate
    ours = Optimizer(fresh(precision="bf16"), OptimizerConfig(name, rate, rounding="kahan"))
    whole = fresh(precision="bf16")
    for path, adapter in whole.items():
        wide = {k: t.detach().float().requires_grad_() for k, t in adapter.tensors.items()}
        whole[path] = adapter.on(wide)
    reference = Optimizer(whole, OptimizerConfig(name, rate))
    for step in range(20):
        for i, (mine, other) in enumerate(zip(ours.factors, reference.factors, strict=True)):
            noise = torch.randn(mine.shape, generator=generator(1, "g", step, i)).bfloat16()
            mine.grad, other.grad = noise, noise.float()
        ours.step(step, 20)
        reference.step(step, 20)
    for i, (mine, other) in enumerate(zip(ours.factors, reference.factors, strict=True)):
        assert torch.equal(joined(mine, ours._rest[i]), other)


def test_rounding_depends_on_the_seed_and_the_step_only():
    def made(seed):
        config = OptimizerConfig("AdamW", 1e-4)
        optimizer = Optimizer(fresh(precision="bf16"), config, seed)
        torch.rand(3)
        return updated(optimizer, 5)

    first, second, other = made(1), made(1), made(2)
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, first, other))


def test_float16_factors_are_refused():
    adapters = fresh()
    path = PATHS[0]
    halves = {k: t.detach().half().requires_grad_() for k, t in adapters[path].tensors.items()}
    adapters[path] = adapters[path].on(halves)
    with pytest.raises(AdapterLabError, match="float16"):
        Optimizer(adapters, OptimizerConfig())
