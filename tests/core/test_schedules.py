"""Schedules against diffusers, transformers and pytorch-optimizer."""

from __future__ import annotations

import diffusers.optimization
import pytest
import pytorch_optimizer
import torch
import transformers.optimization
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.schedules import SCHEDULES, Shape, share
from hypothesis import given
from hypothesis import strategies as st

STEPS, WARMUP, LR = 50, 7, 0.5
DIFFUSERS, TRANSFORMERS = diffusers.optimization, transformers.optimization

# name -> (their schedule over (optimizer, warm-up), how ours is shaped)
PEERS = {
    "constant": (lambda o, w: DIFFUSERS.get_constant_schedule_with_warmup(o, w), {}),
    "linear": (lambda o, w: DIFFUSERS.get_linear_schedule_with_warmup(o, w, STEPS), {}),
    "cosine": (lambda o, w: DIFFUSERS.get_cosine_schedule_with_warmup(o, w, STEPS), {}),
    "cosine, final": (
        lambda o, w: TRANSFORMERS.get_cosine_with_min_lr_schedule_with_warmup(
            o, w, STEPS, min_lr_rate=0.2
        ),
        {"final": 0.2},
    ),
    "cosine with restarts": (
        lambda o, w: DIFFUSERS.get_cosine_with_hard_restarts_schedule_with_warmup(o, w, STEPS, 3),
        {"cycles": 3},
    ),
    "polynomial": (
        lambda o, w: DIFFUSERS.get_polynomial_decay_schedule_with_warmup(
            o, w, STEPS, lr_end=0.1 * LR, power=2.5
        ),
        {"power": 2.5, "final": 0.1},
    ),
    "inverse sqrt": (lambda o, w: TRANSFORMERS.get_inverse_sqrt_schedule(o, w), {}),
}


def taken(make, warmup):
    """The rates that a scheduler gives, a step each."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = make(optimizer, warmup), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", PEERS)
def test_as_others_have_it(name, warmup):
    """During the warm-up we are a step ahead: theirs begins with a step of rate 0."""
    make, shape = PEERS[name]
    kind = name.partition(",")[0]
    config = OptimizerConfig(learning_rate=LR, warmup=warmup, schedule=kind, **shape)
    ours, theirs = [config.rate(i, STEPS) for i in range(STEPS)], taken(make, warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9, abs=1e-12)
    if warmup:
        assert ours[: warmup - 1] == pytest.approx(theirs[1:warmup])
        assert ours[warmup - 1] == LR


def test_wsd_goes_down_at_the_end():
    """transformers counts the descent in steps and wants to be told of each part."""
    decay = 10

    def make(optimizer, warmup):
        return TRANSFORMERS.get_wsd_schedule(
            optimizer, warmup, decay, num_stable_steps=STEPS - warmup - decay, decay_type="1-sqrt"
        )

    config = OptimizerConfig(
        learning_rate=LR, warmup=WARMUP, schedule="wsd", decay=decay / (STEPS - WARMUP)
    )
    ours, theirs = [config.rate(i, STEPS) for i in range(STEPS)], taken(make, WARMUP)
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-9)


def test_rex():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = pytorch_optimizer.REXScheduler(optimizer, STEPS, max_lr=1.0, min_lr=0.0)
    ours = [share("rex", i, STEPS, Shape()) for i in range(STEPS)]
    # It makes its first step itself.
    assert ours == pytest.approx([1.0, *(scheduler.step() for _ in range(STEPS - 1))])


@given(
    st.sampled_from(SCHEDULES), st.integers(0, 40), st.integers(1, 60), st.integers(0, 80),
    st.floats(0.001, 1), st.floats(0, 1), st.integers(1, 5),
)  # fmt: skip
def test_always_a_share(name, warmup, steps, step, decay, final, cycles):
    """Whatever the settings, and past the end of the run as well."""
    shape = Shape(warmup, cycles, 1.0, decay, final)
    value = share(name, step, steps, shape)
    assert 0 <= value <= 1
    assert value > 0 or step >= steps or (name == "wsd" and step >= steps - 1)


def test_warmup():
    rates = [OptimizerConfig(learning_rate=1.0, warmup=4).rate(i, 100) for i in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "Adam"), ("schedule", "step"), ("rounding", "nearest"),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("weight_decay", -0.1),
        ("clip", float("nan")), ("warmup", -1), ("cycles", 0), ("power", 0.0), ("decay", 0.0),
        ("decay", 1.1), ("final", -0.1), ("final", 1.5), ("lora_plus", 0.0),
        ("text_encoder_rate", -1e-4), ("betas", "0.9"), ("betas", "0.9, 1.0"), ("betas", "a, b"),
        ("rates", "blocks"), ("rates", "( = 1e-4"), ("rates", "a = fast"), ("rates", "a = 0"),
        ("rates", "a = -1"), ("arguments", "eps"), ("arguments", "= 3"), ("arguments", "lr = 1"),
        ("arguments", "betas = 1"),
    ],
)  # fmt: skip
def test_unusable_settings(name, value):
    with pytest.raises(AdapterLabError) as error:
        OptimizerConfig(**{name: value})
    if name not in ("rates", "arguments"):
        assert name.replace("_", " ") in str(error.value).replace("_", " ")


def test_what_lines_mean():
    config = OptimizerConfig(
        rates="\n a(?=b).* = 1e-4 \nb=2e-5\n",
        arguments="eps = 1e-6\nnesterov=true\nname = 'x'\nother = word\nnone = None\nt = (1, 2)",
        betas=" 0.5,0.25 ",
    )
    assert config.parsed_rates() == [("a(?=b).*", 1e-4), ("b", 2e-5)]
    assert config.parsed_betas() == (0.5, 0.25)
    assert config.parsed_arguments() == {
        "eps": 1e-6, "nesterov": True, "name": "x", "other": "word", "none": None, "t": (1, 2),
    }  # fmt: skip


def test_notes():
    assert not OptimizerConfig().notes() and not OptimizerConfig("Prodigy", 1.0).notes()
    assert "1 is its usual" in OptimizerConfig("Prodigy", 1e-4).notes()[0]
    assert "0.0001 is its usual" in OptimizerConfig("AdamW", 1.0).notes()[0]
    (note,) = OptimizerConfig("ScheduleFreeAdamW", 1e-3, schedule="cosine").notes()
    assert "needs no schedule" in note
    assert "safeguard" in OptimizerConfig("Prodigy", 1.0, warmup=5).notes()[0]
