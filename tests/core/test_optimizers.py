"""The optimizers: against those of others, in every part, evaluated, and what they refuse."""

from __future__ import annotations

import sys

import prodigyopt
import pytest
import schedulefree
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.optim import Optimizer
from adapter_lab.core.train.optimizers import OPTIMIZERS
from adapter_lab.core.train.random import generator
from toy import Run, copies, fresh, mixed, updated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_factor_moves(name, dtype):
    config = OptimizerConfig(name, OPTIMIZERS[name].rate, rounding="kahan")
    optimizer = Optimizer(mixed(dtype), config)
    before, first = copies(optimizer.factors), optimizer.factors[0]
    updated(optimizer, 12)
    assert {f.ndim for f in before} == {0, 1, 2, 4}
    for factor, was, rest in zip(
        optimizer.factors, before, optimizer._rest.values() or before, strict=True
    ):
        assert factor.isfinite().all() and factor.dtype == dtype
        assert not torch.equal(factor, was) or (dtype != torch.float32 and rest.any())
    optimizer.clear()
    assert first.grad is None


@pytest.mark.parametrize("name", ["AdamW", "ScheduleFreeAdamW", "Prodigy", "SGD"])
def test_a_factor_without_gradient_stays(name):
    optimizer = Optimizer(fresh(), OptimizerConfig(name, OPTIMIZERS[name].rate, 0.0))
    factors, before = optimizer.factors, copies(optimizer.factors)
    updated(optimizer, 1)
    moved = copies(factors)
    for factor in factors[1:]:
        factor.grad = torch.ones_like(factor)
    factors[0].grad = None
    optimizer.step(1, 9)
    assert torch.equal(factors[0], moved[0])
    assert not any(map(torch.equal, factors[1:], moved[1:])) and len(before) == 6


PEERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), weight_decay=0.1),
    "ScheduleFreeAdamW": lambda p: schedulefree.AdamWScheduleFree(
        p, 1e-2, (0.8, 0.95), weight_decay=0.0, foreach=False
    ),
    "Prodigy": lambda p: prodigyopt.Prodigy(p, 1.0, (0.8, 0.95), weight_decay=0.0),
}


@pytest.mark.parametrize("name", PEERS)
def test_as_their_authors_have_it(name):
    config = OptimizerConfig(
        name, 1.0 if name == "Prodigy" else 1e-2, 0.1 * (name == "AdamW"), betas="0.8, 0.95"
    )
    ours = Optimizer(fresh(), config)
    factors = copies(ours.factors)
    theirs = PEERS[name](factors)
    if name.startswith("Schedule"):
        theirs.train()
    updated(ours, 15)
    updated(theirs, 15, factors)
    for mine, other in zip(ours.factors, factors, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=1e-6)
    if name.startswith("Schedule"):
        theirs.eval()
        with ours.evaluated():
            for mine, other in zip(ours.factors, factors, strict=True):
                torch.testing.assert_close(mine, other, rtol=2e-4, atol=1e-6)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    optimizer = Optimizer(mixed(), OptimizerConfig("Muon", 1e-2, 0.0))
    before = copies(optimizer.factors)
    matrices = [i for i, f in enumerate(before) if f.ndim == 2 and min(f.shape) > 1]
    others = [i for i in range(len(before)) if i not in matrices]
    assert len(matrices) == 2 and len(others) == 13
    muon = torch.optim.Muon(
        [before[i] for i in matrices], 1e-2, 0.0, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([before[i] for i in others], 1e-2, weight_decay=0.0)
    updated(optimizer, 4)
    for step in range(4):
        for i, factor in enumerate(before):
            noise = torch.randn(factor.shape, generator=generator(1, "gradient", step, i))
            factor.grad = noise + factor.detach()
        muon.step()
        adamw.step()
    for mine, other in zip(optimizer.factors, before, strict=True):
        torch.testing.assert_close(mine, other)


def test_schedule_reaches_every_part():
    config = OptimizerConfig("Muon", 1e-2, schedule="linear", warmup=2, lora_plus=3.0)
    adapters = {k: v for k, v in mixed().items() if k in ("linear", "norm")}
    optimizer = Optimizer(adapters, config)
    for step, share in ((0, 0.5), (1, 1.0), (2, 1.0), (6, 0.5)):
        updated_once(optimizer, step, 10)
        rates = sorted(g["lr"] for part in optimizer.parts for g in part.param_groups)
        assert rates[0] == pytest.approx(1e-2 * share) == optimizer.rate(step, 10)
        assert rates[-1] == pytest.approx(3e-2 * share)


def updated_once(optimizer, step, steps):
    for factor in optimizer.factors:
        factor.grad = torch.ones_like(factor)
    optimizer.step(step, steps)


def test_rate_of_prodigy_is_what_it_found():
    optimizer = Optimizer(fresh(), OptimizerConfig("Prodigy", 0.5))
    assert optimizer.rate(0, 10) == pytest.approx(0.5e-6)
    updated(optimizer, 10)
    group = optimizer.parts[0].param_groups[0]
    assert optimizer.rate(9, 10) == 0.5 * group["d"] > 0.5e-6


# Schedule-free


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if row.averages])
def test_evaluating_leaves_no_trace(name, precision):
    config = OptimizerConfig(name, OPTIMIZERS[name].rate, rounding="kahan")
    looked, left = (Run(config, precision=precision) for _ in range(2))

    def look(_):
        before = copies(looked.optimizer.factors)
        with looked.optimizer.evaluated(), looked.optimizer.evaluated():
            pairs = list(zip(looked.optimizer.factors, before, strict=True))
            seen.append(all(torch.equal(a, b) for a, b in pairs))
        assert all(map(torch.equal, looked.optimizer.factors, before))

    seen = []
    looked.train(6, look)
    left.train(6)
    assert all(map(torch.equal, looked.tensors(), left.tensors()))
    assert not all(seen)


def test_evaluating_ends_with_an_exception():
    run = Run(OptimizerConfig("ScheduleFreeAdamW", 1e-2)).train(4)
    before = copies(run.optimizer.factors)
    with pytest.raises(KeyboardInterrupt), run.optimizer.evaluated():
        assert not all(map(torch.equal, run.optimizer.factors, before))
        raise KeyboardInterrupt
    assert all(map(torch.equal, run.optimizer.factors, before))
    run.optimizer.state_dict()


def test_others_are_meant_as_they_are():
    run = Run().train(2)
    before = copies(run.optimizer.factors)
    with run.optimizer.evaluated():
        assert all(map(torch.equal, run.optimizer.factors, before))


# Settings


@pytest.mark.parametrize(
    ("name", "pip"),
    [("Prodigy", "pytorch-optimizer"), ("AdamW8bit", "bitsandbytes")],
)
def test_missing_packages_are_named(monkeypatch, name, pip):
    row = OPTIMIZERS[name]
    monkeypatch.setitem(sys.modules, row.package, None)
    with pytest.raises(AdapterLabError, match=rf"pip install --upgrade {pip}"):
        Optimizer(fresh(), OptimizerConfig(name, row.rate))


def test_old_packages_are_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(AdapterLabError, match="Muon.*a torch without it.*--upgrade torch"):
        Optimizer(fresh(), OptimizerConfig("Muon"))


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("CAME", "epsilon = 1", "no argument 'epsilon'"),
        ("AdamW", "maximize = true", "no argument 'maximize'"),
        ("AdamW", "epsilon = 1", "one of eps, amsgrad"),  # what has a setting is not among them
        ("Prodigy", "d_coef = two", "'d_coef' of Prodigy is unusable: found two, .* number"),
        ("CAME", "clip_threshold = (1, 2)", "'clip_threshold' of CAME is unusable"),
        ("Prodigy", "beta3 = 7", "refuses its settings"),
        ("Adafactor", "d = 0.5", "refuses its settings.*Clipping"),
    ],
)
def test_unusable_arguments(name, arguments, says):
    with pytest.raises(AdapterLabError, match=says):
        Optimizer(fresh(), OptimizerConfig(name, arguments=arguments))


def test_arguments_arrive():
    optimizer = Optimizer(fresh(), OptimizerConfig("AdamW", arguments="eps = 0.5\namsgrad = true"))
    group = optimizer.parts[0].param_groups[0]
    assert group["eps"] == 0.5 and group["amsgrad"] is True
