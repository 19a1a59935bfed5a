"""Runs that calibrate a model, and what the next ones make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapter_lab.core.cache.calibration import read_calibration
from adapter_lab.nodes.host import caching, paths, ratios
from adapter_lab.nodes.host.fingerprint import base_fingerprint
from calibrated import STEPS, adapted, files, sample, schedule, store
from comfy.model_management import InterruptProcessingException

SKIPPING = caching.Settings(threshold=100.0, retention=0.2)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def told(monkeypatch):
    """What the sessions of a test went by, in turn: their sources, after the run."""
    seen = []
    ask = ratios.choose

    def choose(*args, **more):
        seen.append(ask(*args, **more))
        return seen[-1]

    monkeypatch.setattr("adapter_lab.nodes.host.cache_session.choose", choose)
    return seen


@pytest.mark.parametrize("kind, level", [("flux", "blocks"), ("wan", "blocks")])
def test_first_run_calibrates_and_the_next_ones_skip(model, told, kind, level):
    plain = sample(model(kind), kind)
    cached = caching.attach(model(kind), SKIPPING)
    assert torch.equal(sample(cached, kind), plain)
    name = f"{kind}-{base_fingerprint(model(kind))}-{level}"
    assert files() == [f"{name}.json"] and told[-1].calibrating
    sigmas = schedule(model(kind))
    assert told[-1].notes == [
        f"Stored as '{name}', noise levels {sigmas[0]:.4g} to {sigmas[-2]:.4g}"
    ]  # fmt: skip
    kept = read_calibration(paths.calibrations() / files()[0])
    assert kept.steps == STEPS and set(kept.curves) == {"cond", "uncond"}
    for curve in kept.curves.values():
        assert curve.sigmas == pytest.approx(sigmas[:-1]) and len(set(curve.ratios)) > 2
    skipped = sample(cached, kind)
    assert not torch.equal(skipped, plain) and torch.equal(sample(cached, kind), skipped)
    assert [s.name for s in told] == ["calibrating", *[f"calibrated: {name}"] * 2]
    assert not told[-1].notes and torch.equal(sample(model(kind), kind), plain)
    (paths.calibrations() / files()[0]).unlink()
    assert torch.equal(sample(cached, kind), plain) and files() == [f"{name}.json"]


def test_a_network_as_a_whole_is_calibrated(model, told):
    """SD1.5, whose blocks can't be replaced, with one branch."""
    options = dict(steps=8, cfg=1.0)
    plain = sample(model("sd15"), "sd15", **options)
    cached = caching.attach(model("sd15"), SKIPPING)
    assert torch.equal(sample(cached, "sd15", **options), plain)
    assert files() == [f"sd15-{base_fingerprint(model('sd15'))}-network.json"]
    assert not torch.equal(sample(cached, "sd15", **options), plain)
    assert told[-1].ratios("uncond") == told[-1].ratios("cond")


@pytest.mark.parametrize("what", ["another model", "no JSON"])
def test_a_useless_file_is_replaced(model, told, what):
    plain, path = sample(model("flux")), store(model("flux"))
    made = store(model("wan")).read_text() if what == "another model" else "{"
    path.write_text(made)
    cached = caching.attach(model("flux"), SKIPPING)
    assert torch.equal(sample(cached), plain)
    assert what in told[-1].notes[0] and "Stored" in told[-1].notes[1]
    assert read_calibration(path).fingerprint == base_fingerprint(model("flux"))
    assert not torch.equal(sample(cached), plain) and not told[-1].notes


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_adapters_share_the_calibration_of_their_model(model, told, mode):
    sample(caching.attach(model("flux"), SKIPPING))
    clone = adapted(model("flux"), "flux", mode)
    plain = sample(clone)
    assert not torch.equal(sample(caching.attach(clone, SKIPPING)), plain)
    assert not told[-1].calibrating and len(files()) == 1


def test_always_calibrates_anew_and_keeps_the_picture(model, told):
    path = store(model("flux"))
    plain, before = sample(model("flux")), read_calibration(path)
    cached = caching.attach(model("flux"), replace(SKIPPING, calibrate="always"))
    for _ in range(2):
        assert torch.equal(sample(cached), plain) and told[-1].calibrating
    assert read_calibration(path).curves["cond"].ratios != before.curves["cond"].ratios
    assert files() == [path.name]


def test_two_samplers_calibrate_a_schedule_in_parts(model, told):
    """Of one model; either run is computed until its own noise levels are known."""
    cached = caching.attach(model("flux"), SKIPPING)
    halves = [dict(last_step=5, force_full_denoise=False), dict(start_step=5, disable_noise=True)]
    plain = [sample(model("flux"), **half) for half in halves]
    for half, expected in zip(halves, plain, strict=True):
        assert torch.equal(sample(cached, **half), expected)
    assert [s.calibrating for s in told] == [True, True]
    kept = read_calibration(paths.calibrations() / files()[0])
    sigmas = schedule(model("flux"))[:-1]
    for curve in kept.curves.values():
        assert curve.sigmas == pytest.approx(sigmas) and curve.ratios[5] not in (1, None)
    for half, expected in zip(halves, plain, strict=True):
        assert not torch.equal(sample(cached, **half), expected)
    sample(cached)
    assert not any(s.calibrating for s in told[2:])


def test_nothing_is_stored_of_a_run_that_ends_early(model, told):
    cached = caching.attach(model("flux"), SKIPPING)

    def stop(step, *_):
        if step == STEPS - 2:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        sample(cached, callback=stop)
    assert files() == [] and told[-1].calibrating
    assert torch.equal(sample(cached), sample(model("flux"))) and len(files()) == 1


@pytest.mark.parametrize("calibrate", ["when missing", "always"])
def test_few_steps_are_never_calibrated(model, told, calibrate):
    cached = caching.attach(model("flux"), replace(SKIPPING, calibrate=calibrate))
    assert torch.equal(sample(cached, steps=7), sample(model("flux"), steps=7))
    assert files() == [] and not any(s.calibrating for s in told)


def test_a_disk_that_takes_nothing_costs_no_picture(model, told):
    plain = sample(model("flux"))
    paths.calibrations().parent.parent.mkdir(parents=True)
    paths.calibrations().parent.write_text("a file where the folder should be")
    assert torch.equal(sample(caching.attach(model("flux"), SKIPPING)), plain)
    assert "could not be stored" in told[-1].notes[-1]


def test_samplers_that_evaluate_twice_a_step_calibrate_once_a_noise_level(model, told):
    cached = caching.attach(model("flux"), SKIPPING)
    assert torch.equal(sample(cached, sampler="heun"), sample(model("flux"), sampler="heun"))
    curve = read_calibration(paths.calibrations() / files()[0]).curves["cond"]
    assert curve.sigmas == pytest.approx(schedule(model("flux"))[:-1])
