"""Which factor learns how fast, and which ones decay."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.optim import Optimizer
from adapter_lab.core.train.rates import rated
from toy import PATHS, copies, fresh, mixed


def rates(config, adapters=None):
    return {r.name.rpartition("|")[::2]: r.rate for r in rated(adapters or fresh(), config)}


def test_rates_by_module():
    config = OptimizerConfig(
        learning_rate=1.0,
        rates=r"blocks\.1\..* = 0.25" + "\n" + r"blocks\..* = 0.5" + "\n" + r"clip_l\.none|x = 9",
        text_encoder_rate=0.125,
    )
    with pytest.raises(AdapterLabError, match=r"'clip_l\\.none\|x' .*matches no module"):
        rates(config)
    config = OptimizerConfig(
        learning_rate=1.0, rates="blocks.1.* = 0.25\nblocks.* = 0.5", text_encoder_rate=0.125
    )
    found = rates(config)
    assert {path: rate for (path, _), rate in found.items()} == dict(
        zip(PATHS, (0.5, 0.25, 0.125), strict=True)
    )
    whole = OptimizerConfig(learning_rate=1.0, rates="proj = 2")
    with pytest.raises(AdapterLabError, match="whole names such as 'blocks.0.proj'"):
        rates(whole)
    encoder = OptimizerConfig(learning_rate=1.0, rates="clip_l.* = 2", text_encoder_rate=0.5)
    assert rates(encoder)[PATHS[2], "lora_up.weight"] == 2


def test_text_encoders_learn_as_the_model_unless_told():
    assert set(rates(OptimizerConfig(learning_rate=0.5)).values()) == {0.5}


def test_lora_plus_raises_the_side_that_starts_at_zero():
    found = rates(OptimizerConfig(learning_rate=1e-4, lora_plus=16.0))
    for (_, name), rate in found.items():
        assert rate == pytest.approx(1.6e-3 if name == "lora_up.weight" else 1e-4)
    adapters = fresh()
    for adapter in adapters.values():
        assert not adapter.tensors["lora_up.weight"].any()
    together = mixed()
    together.pop("turn")
    found = rates(OptimizerConfig(learning_rate=1e-4, lora_plus=2.0), together)
    fast = {name for (_, name), rate in found.items() if rate > 1e-4}
    assert fast == {"lora_up.weight"}


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "oft", "boft", "full"])
def test_lora_plus_without_sides_is_refused(algorithm):
    adapters = fresh(algorithm=algorithm)
    title = adapters[PATHS[0]].title
    with pytest.raises(AdapterLabError, match=rf"no meaning for {title}"):
        rates(OptimizerConfig(lora_plus=4.0), adapters)


def test_decay_pulls_deltas_and_not_lengths():
    kept = {r.name for r in rated(mixed(), OptimizerConfig()) if not r.decays}
    assert kept == {
        "conv|dora_scale", "conv|scalar", "linear|dora_scale", "linear|scalar", "turn|rescale"
    }  # fmt: skip
    optimizer = Optimizer(mixed(), OptimizerConfig(weight_decay=0.5))
    names = [r.name for r in rated(mixed(), OptimizerConfig())]
    before = copies(optimizer.factors)
    for factor in optimizer.factors:
        factor.grad = torch.zeros_like(factor)
    optimizer.step(0, 1)
    for name, now, was in zip(names, optimizer.factors, before, strict=True):
        torch.testing.assert_close(now, was if name in kept else was * (1 - 1e-4 * 0.5))


def test_one_rate_for_those_that_find_it():
    with pytest.raises(AdapterLabError, match="one learning rate for all factors"):
        Optimizer(fresh(), OptimizerConfig("Prodigy", 1.0, text_encoder_rate=0.5))


def test_nothing_to_train():
    with pytest.raises(AdapterLabError, match="nothing to train"):
        Optimizer({}, OptimizerConfig())
