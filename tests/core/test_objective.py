"""Losses, weights and noise of the objective, against diffusers and numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.data import TrainItem
from adapter_lab.core.train.losses import LOSSES, SCHEDULES, element_losses
from adapter_lab.core.train.objective import BOUNDS, Objective, ObjectiveConfig
from adapter_lab.core.train.process import Flow, Table, VarianceFlow
from adapter_lab.core.train.weighting import WEIGHTINGS, weights
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDPMScheduler(1000, **BETAS)
ROWS = torch.tensor([0, 1, 30, 400, 600, 999])
LEVELS = (ROWS + 0.5) / 1000


def table(kind, sigma_data=1.0):
    alphas = SCHEDULER.alphas_cumprod
    return Table(kind, ((1 - alphas) / alphas).sqrt(), sigma_data)


@pytest.mark.parametrize(("kind", "below"), [("eps", 0.0), ("v", 1.0), ("edm", 1.0)])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_discrete_models(kind, below, gamma):
    """min(SNR, gamma) over SNR for noise, over SNR + 1 for v (Hang et al. 2023, section 3.4)."""
    snr = compute_snr(SCHEDULER, ROWS)
    expected = snr.clamp(max=gamma) / (snr + below)
    torch.testing.assert_close(weights("min_snr", table(kind), LEVELS, gamma), expected)


def test_min_snr_of_a_flow():
    """The error of the clean latent is t times that of the velocity, and SNR ((1 - t) / t)^2."""
    t = torch.tensor([0.1, 0.3, 0.5, 0.9])
    expected = torch.tensor([0.05, 0.45, 0.25, 0.01])  # min((1 - t)^2, 5 t^2)
    torch.testing.assert_close(weights("min_snr", Flow(3.0), t, 5.0), expected)
    torch.testing.assert_close(weights("min_snr", VarianceFlow(0.1, 80.0), t, 5.0), expected)


def test_debiased():
    """1 / sqrt(SNR) and 1 / (SNR + 1) with SNR at most 1000, as sd-scripts has it."""
    snr = compute_snr(SCHEDULER, ROWS).clamp(max=1000)
    torch.testing.assert_close(weights("debiased", table("eps"), LEVELS, 5), snr**-0.5)
    torch.testing.assert_close(weights("debiased", table("v"), LEVELS, 5), 1 / (snr + 1))
    assert snr[0] == 1000


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap"])
def test_schemes_of_sd3(name):
    t = torch.linspace(0.01, 0.99, 20)
    torch.testing.assert_close(
        weights(name, Flow(), t, 5.0), compute_loss_weighting_for_sd3(name, t)
    )


@pytest.mark.parametrize(
    ("weighting", "noise"),
    [("cosmap", table("eps")), ("sigma_sqrt", table("v")), ("debiased", Flow())],
)
def test_weightings_that_mean_nothing_are_refused(weighting, noise):
    with pytest.raises(AdapterLabError, match=f"'{weighting}' is not defined"):
        Objective(ObjectiveConfig(weighting=weighting)).require(noise)


def test_losses_of_one_error():
    """d = 3, c = 4: sqrt(d^2 + c^2) = 5."""
    d, c = torch.tensor([[3.0]]), torch.tensor([4.0])
    made = {name: element_losses(name, d, c).item() for name in LOSSES}
    assert made == {"mse": 9.0, "huber": 8.0, "smooth_l1": 2.0, "l1": 3.0}


def test_huber_lies_between_squares_and_absolute_values():
    d = torch.linspace(-2, 2, 41)[None]
    square = element_losses("huber", d, torch.tensor([1e3]))
    torch.testing.assert_close(square, d.square())
    absolute = element_losses("smooth_l1", d, torch.tensor([1e-6]))
    torch.testing.assert_close(absolute, 2 * d.abs(), rtol=1e-4, atol=1e-5)


def test_huber_schedules():
    """c = 0.1, t = 0.25: constant; exp(log(c) t); (1 - c) / (1 + sigma)^2 + c with sigma 1 / 3."""
    t = torch.tensor([0.25])
    made = [SCHEDULES[name](Flow(), t, 0.1).item() for name in ("constant", "exponential", "snr")]
    assert made == pytest.approx([0.1, 0.1**0.25, 0.60625])
    alphas = SCHEDULER.alphas_cumprod[ROWS]
    sigma = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(
        SCHEDULES["snr"](table("v"), LEVELS, 0.1), 0.9 / (1 + sigma) ** 2 + 0.1
    )


class Blind:
    """A flow whose network always says 0, so that the error is the target; remembers its inputs."""

    half, noise = False, Flow()

    def latents(self, items):
        return torch.stack([item.latent for item in items])

    def corrupt(self, x0, noise, sigma):
        s = sigma.view(-1, *(1,) * (x0.ndim - 1))
        self.x_t = (1 - s) * x0 + s * noise
        return self.x_t

    def target(self, x0, x_t, sigma):
        self.said = (x_t - x0) / sigma.view(-1, *(1,) * (x0.ndim - 1))
        return self.said

    def predict(self, x_t, sigma, items, t, number=None):
        self.told = (x_t, sigma, t, number)
        return torch.zeros_like(x_t)


def item(shape=(4, 6, 6), value=0.0, **more):
    return TrainItem(torch.full(shape, value), None, **more)


def losses(items, process=None, seed=0, **config):
    objective = Objective(ObjectiveConfig(**config))
    process = process or Blind()
    made = objective.losses(process, items, torch.Generator().manual_seed(seed), 7)
    return made, process


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 3, 6, 6)])
def test_loss_of_each_item(name, shape):
    made, process = losses([item(shape), item(shape)], loss=name, huber_schedule="constant")
    error, c = process.said, 0.1
    expected = {
        "mse": error**2,
        "l1": error.abs(),
        "huber": 2 * c * ((error**2 + c * c).sqrt() - c),
        "smooth_l1": 2 * ((error**2 + c * c).sqrt() - c),
    }[name]
    torch.testing.assert_close(made.values, expected.flatten(1).mean(1))
    x_t, sigma, t, number = process.told
    assert number == 7 and torch.equal(t, made.t) and torch.equal(sigma, made.t)


def test_the_weight_of_the_level_multiplies_the_loss():
    plain, _ = losses([item(), item()], seed=3)
    weighted, _ = losses([item(), item()], seed=3, weighting="cosmap")
    t = plain.t
    scale = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    torch.testing.assert_close(weighted.values, plain.values * scale)


def test_regularisation_and_weights():
    plain, _ = losses([item(), item(), item()])
    made, _ = losses([item(), item(regularisation=True), item(weight=2.0)], prior_weight=0.3)
    torch.testing.assert_close(made.values, plain.values * torch.tensor([1.0, 0.3, 2.0]))


def test_masks():
    """White counts in full, black with unmasked_weight, grey as it is where that is more."""
    mask = torch.zeros(12, 12)
    mask[:, :4], mask[:, 4:8] = 1.0, 0.5
    made, process = losses([item(mask=mask), item()], unmasked_weight=0.2)
    columns = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.2, 0.2])
    expected = (process.said[0] ** 2 * columns).mean()
    torch.testing.assert_close(made.values[0], expected)
    torch.testing.assert_close(made.values[1], (process.said[1] ** 2).mean())


def test_masks_cover_all_frames():
    mask = torch.zeros(6, 6)
    mask[2:] = 1.0
    made, process = losses([item((4, 3, 6, 6), mask=mask)])
    expected = (process.said[0] ** 2)[..., 2:, :].sum() / process.said[0].numel()
    torch.testing.assert_close(made.values[0], expected)


@pytest.mark.parametrize("shape", [(512, 8, 8), (512, 4, 8, 8)])
def test_noise_offset(shape):
    """The mean of a channel varies by the offset instead of by 1 / sqrt(its size)."""
    _, plain = losses([item(shape)])
    _, shifted = losses([item(shape)], noise_offset=0.5)
    own = plain.said[0].flatten(1)
    assert own.mean(1).std() == pytest.approx(own.shape[1] ** -0.5, rel=0.15)
    added = (shifted.said - plain.said)[0].flatten(1)
    assert added.std(1).max() < 1e-5
    assert added.mean(1).std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("scale", "expected"), [(0.25, 1.0), (-0.5, 0.0)])
def test_adaptive_noise_offset(scale, expected):
    """0.5 and a channel whose mean is -2: 0.5 + scale |-2|, never below 0."""
    _, plain = losses([item((512, 8, 8), -2.0)])
    _, made = losses([item((512, 8, 8), -2.0)], noise_offset=0.5, adaptive_noise_scale=scale)
    added = (made.said - plain.said)[0].flatten(1).mean(1)
    assert added.std() == pytest.approx(expected, rel=0.1, abs=1e-5)


def test_input_perturbation_is_not_in_the_target():
    items = [item((64, 16, 16))]
    _, plain = losses(items)
    _, made = losses(items, input_perturbation=0.1)
    torch.testing.assert_close(made.said, plain.said)
    t = made.told[2]
    more = (made.told[0] - plain.told[0]) / t
    assert more.std().item() == pytest.approx(0.1, rel=0.02)


def test_fixed_is_the_same_under_every_objective():
    process, rng = Blind(), torch.Generator()
    config = ObjectiveConfig("uniform", loss="l1", weighting="cosmap", noise_offset=0.5)
    made = [
        Objective(c).fixed(process, item(), 0.25, rng.manual_seed(5))
        for c in (ObjectiveConfig(), config)
    ]
    assert torch.equal(*made) and process.told[1].item() == 0.25 and process.told[3] is None
    torch.testing.assert_close(made[0], process.said.square().mean()[None])


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    config = dict(noise_offset=0.1, input_perturbation=0.1, timestep_range="reject")
    first, second = (losses([item(), item()], **config)[0] for _ in range(2))
    assert torch.equal(first.values, second.values) and torch.equal(first.t, second.t)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e9, 1e9])
def test_numbers_out_of_range(name, wrong):
    with pytest.raises(AdapterLabError, match=f"'{name}' is out of range"):
        ObjectiveConfig(**{name: wrong})


@pytest.mark.parametrize(
    "name", ["timestep_sampling", "timestep_range", "weighting", "loss", "huber_schedule"]
)
def test_unknown_names(name):
    with pytest.raises(AdapterLabError, match=f"Unknown {name} 'x': expected one of"):
        ObjectiveConfig(**{name: "x"})


def test_empty_range():
    with pytest.raises(AdapterLabError, match="range of timesteps is empty"):
        ObjectiveConfig(min_timestep=0.5, max_timestep=0.5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_where_levels_are_drawn(name):
    for noise in (Flow(), table("eps"), table("v")):
        if noise.kind in WEIGHTINGS[name].kinds:
            t = torch.linspace(noise.margin, 1 - noise.margin, 1000)
            made = weights(name, noise, t, 5.0)
            assert made.isfinite().all() and (made > 0).all()
