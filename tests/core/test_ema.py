"""The averages of a training run against the profile they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.power import gamma
from adapter_lab.core.train.ema import WIDTHS, Tracker
from toy import Run

# Exponents as musubi-tuner's own function gives them.
GAMMAS = {
    0.05: 16.972198602, 0.10: 6.937203938, 0.15: 3.557868775, 0.20: 1.826213780, 0.25: 0.719823958
}  # fmt: skip


@pytest.mark.parametrize("width", GAMMAS)
def test_gamma(width):
    g = gamma(width)
    assert g == pytest.approx(GAMMAS[width], abs=1e-8)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(width)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, float("nan")])
def test_widths_without_an_average(width):
    with pytest.raises(AdapterLabError, match="width"):
        gamma(width)


def test_the_widest_average_is_the_plain_mean():
    assert gamma(12**-0.5) == pytest.approx(0, abs=1e-6)


def test_averages_are_the_profile_over_the_trajectory():
    """sum over tau of w_tau * (tau^(g + 1) - (tau - 1)^(g + 1)) / t^(g + 1), in closed form."""
    points, run = [], Run()

    def on_step(_):
        points.append([f.detach().double().numpy() for f in run.optimizer.factors])

    run.train(40, on_step)
    for width in WIDTHS:
        power = GAMMAS[width] + 1
        times = np.arange(41.0) ** power
        weights = np.diff(times) / times[-1]
        assert weights.sum() == pytest.approx(1)
        for i, average in enumerate(run.trackers.states[width]):
            expected = sum(w * p[i] for w, p in zip(weights, points, strict=True))
            np.testing.assert_allclose(average.numpy(), expected, rtol=2e-5, atol=1e-7)
            assert np.abs(expected - points[-1][i]).max() > 1e-4


def test_bf16_factors_are_averaged_in_float32():
    tracker = Tracker([torch.ones(3, dtype=torch.bfloat16)])
    for step in range(1, 11):
        tracker.update([torch.full((3,), 1 + step % 2 / 128, dtype=torch.bfloat16)], step)
    average = tracker.states[0.10][0]
    assert average.dtype == torch.float32
    assert 1 < average[0] < 1 + 1 / 128
