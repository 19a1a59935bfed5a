"""The noise levels that training draws, against their closed forms and against diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.process import Flow, Table, VarianceFlow
from adapter_lab.core.train.timesteps import NAMES, Timesteps
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

COUNT = 20_000
# Of the distance between two distribution functions; 1 % of honest draws exceed it.
CRITICAL = 1.63 / math.sqrt(COUNT)
SIZE = (128, 128)  # latent of 1024 x 1024 pixels
LOG5 = math.log(5)
GRID = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)


def sd_sigmas():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    alphas = DDPMScheduler(1000, **betas).alphas_cumprod
    return ((1 - alphas) / alphas).sqrt()


def draw(steps, noise=None, size=SIZE, count=COUNT):
    return steps.draw(noise or Flow(), size, count, torch.Generator().manual_seed(0)).double()


def cdf(t, at=GRID):
    return torch.searchsorted(t.sort().values, at, right=True).double() / len(t)


def normal(z):
    return 0.5 * (1 + torch.erf(torch.as_tensor(z) / math.sqrt(2)))


# Distribution functions by hand: a sigmoid of N(m, s) is below t where the normal is below its
# logit; multiplying odds by k adds log k to it.
@pytest.mark.parametrize(
    ("steps", "noise", "expected"),
    [
        (Timesteps("uniform"), Flow(), lambda t: t),
        (Timesteps("logit_normal", 0.5, 0.8), Flow(), lambda t: normal((t.logit() - 0.5) / 0.8)),
        (Timesteps("sigmoid", std=1.7), Flow(), lambda t: normal(t.logit() / 1.7)),
        (Timesteps("shift", shift=3.0), Flow(), lambda t: normal(t.logit() - math.log(3))),
        (Timesteps("shift", std=2, shift=0.2), Flow(), lambda t: normal((t.logit() + LOG5) / 2)),
        (Timesteps("auto"), Flow(3.16), lambda t: normal(t.logit() - math.log(3.16))),
        # Wan is sampled with 8, LTX-Video with exp(2.37); trained with 2 to 7.
        (Timesteps("auto"), Flow(8.0), lambda t: normal(t.logit() - LOG5)),
        (Timesteps("auto"), VarianceFlow(0.002, 80.0), lambda t: normal(t.logit())),
        (Timesteps("auto"), Table("eps", torch.linspace(0.1, 9, 1000)), lambda t: t),
        (Timesteps("schedule"), Flow(3.0), lambda t: t / (3 - 2 * t)),
        (
            Timesteps("schedule"),
            VarianceFlow(0.002, 80.0),
            lambda t: ((t.logit() - math.log(0.002)) / math.log(80 / 0.002)).clamp(0, 1),
        ),
        # L ~ N(1, 2) with t = sigmoid(-L / 2): t < x where L > -2 logit(x).
        (Timesteps("logsnr", 1.0, 2.0), Flow(), lambda t: normal((2 * t.logit() + 1) / 2)),
    ],
)  # fmt: skip
def test_distributions(steps, noise, expected):
    t = draw(steps, noise)
    assert (cdf(t) - expected(GRID)).abs().max() < CRITICAL


@pytest.mark.parametrize(
    ("sampling", "size", "mu"),
    [
        ("flux_shift", (32, 32), 0.5),
        ("flux_shift", (128, 128), 1.15),
        ("flux_shift", (64, 64), 0.5 + 768 * 0.65 / 3840),
        ("flux_shift", (65, 129), 0.5 + (32 * 64 - 256) * 0.65 / 3840),
        ("flux2_shift", (64, 64), 1.15),
        ("qwen_shift", (128, 128), 0.5 + 3840 * 0.4 / 7936),
        ("krea2_shift", (160, 160), 1.15),
    ],
)
def test_shifts_by_resolution(sampling, size, mu):
    t = draw(Timesteps(sampling), size=size)
    assert (cdf(t) - normal(GRID.logit() - mu)).abs().max() < CRITICAL


@pytest.mark.parametrize(("name", "scale"), [("mode", 1.29), ("mode", -0.7), ("logit_normal", 0)])
def test_like_diffusers(name, scale):
    theirs = compute_density_for_timestep_sampling(
        name, COUNT, logit_mean=0.3, logit_std=0.9, mode_scale=scale,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    ours = draw(Timesteps(name, 0.3, 0.9, mode_scale=scale))
    assert (cdf(ours) - cdf(theirs.double())).abs().max() < CRITICAL * math.sqrt(2)


def test_logsnr_of_a_discrete_model():
    """log sigma = -L / 2, as far as the table reaches."""
    noise = Table("eps", sd_sigmas())
    t = draw(Timesteps("logsnr", -0.5, 0.7), noise)
    sigma = noise.sigma(t).double()
    at = torch.linspace(0.05, 8, 100, dtype=torch.float64)
    assert (cdf(sigma, at) - normal((2 * at.log() - 0.5) / 0.7)).abs().max() < CRITICAL + 0.005


def test_discrete_timesteps_are_drawn_equally_often():
    noise = Table("v", sd_sigmas())
    t = draw(Timesteps("uniform"), noise, count=200_000)
    counts = torch.bincount((t * 1000).long(), minlength=1000)
    # 200 each: 5 standard deviations of a Poisson number.
    assert counts.min() > 130 and counts.max() < 270 and len(counts) == 1000
    assert set(noise.sigma(t).tolist()) == set(sd_sigmas().tolist())


def test_range_is_rescaled_or_cut():
    squeezed = draw(Timesteps("logit_normal", low=0.2, high=0.6))
    cut = draw(Timesteps("logit_normal", low=0.2, high=0.6, limit="reject"))
    for t in (squeezed, cut):
        assert t.min() >= 0.2 and t.max() <= 0.6
    at = torch.linspace(0.21, 0.59, 50, dtype=torch.float64)
    low, high = (normal(torch.tensor(x, dtype=torch.float64).logit()) for x in (0.2, 0.6))
    assert (cdf(squeezed, at) - normal(((at - 0.2) / 0.4).logit())).abs().max() < CRITICAL
    assert (cdf(cut, at) - (normal(at.logit()) - low) / (high - low)).abs().max() < CRITICAL


def test_a_range_that_is_never_met():
    steps = Timesteps("logit_normal", 6.0, 0.1, low=0.1, high=0.2, limit="reject")
    with pytest.raises(AdapterLabError, match=r"found 0 of .* between 0.1 and 0.2.*rescale"):
        draw(steps, count=2)


@pytest.mark.parametrize("std", [0.0, 100.0])
@pytest.mark.parametrize("noise", [Flow(7.0), Table("v", sd_sigmas())])
@pytest.mark.parametrize("name", NAMES)
def test_extremes_stay_inside(name, noise, std):
    if name.endswith("_shift") and noise.kind != "flow":
        with pytest.raises(AdapterLabError, match="flow models"):
            draw(Timesteps(name), noise, count=1)
        return
    t = draw(Timesteps(name, 50.0, std, shift=1000.0), noise, count=500)
    assert ((t > 0) & (t < 1)).all()
    assert noise.sigma(t).isfinite().all() and noise.snr(t).isfinite().all()


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    for name in NAMES:
        assert torch.equal(draw(Timesteps(name), count=9), draw(Timesteps(name), count=9))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", [Flow(), Flow(scale=2.5), VarianceFlow(0.01, 50.0)])
def test_level_is_the_inverse_of_snr(noise):
    t = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(noise.level(noise.snr(t)), t, rtol=1e-4, atol=1e-5)


def test_level_finds_the_row_of_the_table():
    noise = Table("eps", sd_sigmas())
    t = (torch.arange(1000) + 0.5) / 1000
    torch.testing.assert_close(noise.level(noise.snr(t)), t, rtol=0, atol=0.0011)
