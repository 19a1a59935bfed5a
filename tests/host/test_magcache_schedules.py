"""Which schedule a run is a part of, and what real samplers skip of it."""

from __future__ import annotations

import math

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import samples
import torch
from adapter_lab.nodes.host import caching
from adapter_lab.nodes.host.whole_schedule import limits, whole
from comfy.samplers import KSampler, calculate_sigmas
from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    FlipSigmas,
    ManualSigmas,
    SDTurboScheduler,
    SplitSigmasDenoise,
)
from comfy_extras.nodes_flux import Flux2Scheduler


def flow(shift):
    made = comfy.model_sampling.ModelSamplingDiscreteFlow()
    made.set_parameters(shift=shift)
    return made


SAMPLINGS = {
    "sd15": comfy.model_sampling.ModelSamplingDiscrete(),
    "v-prediction, zero SNR": comfy.model_sampling.ModelSamplingDiscrete(zsnr=True),
    "wan": flow(8.0),
    "flux": comfy.model_sampling.ModelSamplingFlux(),
}
EVERY = pytest.mark.parametrize("name", SAMPLINGS)
SCHEDULERS = pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)


class Model:
    """As far as nodes that make sigmas know it."""

    def __init__(self, name):
        self.load_device, self.sampling = torch.device("cpu"), SAMPLINGS[name]

    def get_model_object(self, _):
        return self.sampling


def lists(part):
    return [float(s) for s in part]


def assert_part(part, full, sampling, sampler=None, start=None):
    """``part`` is found in a schedule that has it at the place where ``full`` has it."""
    part, full = lists(part), lists(full)
    made = whole(part, sampling, sampler)
    begin = full.index(part[0]) if start is None else start
    known = part[:-1]
    assert made.sigmas[made.start : made.stop] == pytest.approx(known, rel=1e-4)
    assert made.stop - made.start == len(known)
    assert (made.start, made.steps) == (begin, len(full) - 1), made.how
    return made


@EVERY
@SCHEDULERS
@pytest.mark.parametrize("steps", [8, 30])
def test_a_part_of_a_schedule_is_found_in_it(name, scheduler, steps):
    sampling = SAMPLINGS[name]
    full = calculate_sigmas(sampling, scheduler, steps).tolist()
    half, end = len(full) // 2, len(full) - 1
    whole_run = assert_part(full, full, sampling)
    assert (whole_run.stop, whole_run.cut) == (end, False)
    if scheduler in ("ddim_uniform", "normal") and steps == 8:
        return  # the middle of these is that of sgm_uniform with 7 or 9 steps to the last bit
    assert assert_part(full[half:], full, sampling).stop == end
    for part in (full[: half + 1], full[2 : half + 1]):
        if len(full) % 2:  # an odd number of steps may be an even one of another scheduler
            assert not assert_part(part, full, sampling).cut
            if part[0] < full[0] or len(part) > 8:  # 8 steps from all noise to none are a schedule
                assert assert_part([*part[:-1], 0.0], full, sampling).cut


@EVERY
@pytest.mark.parametrize("sampler", ["euler", "dpm_2", "uni_pc"])
@pytest.mark.parametrize("denoise", [0.35, 0.8])
def test_ksampler_with_less_denoise(name, sampler, denoise):
    sampling = SAMPLINGS[name]
    made = KSampler(Model(name), 10, "cpu", sampler, "simple", denoise)
    full = KSampler(Model(name), int(10 / denoise), "cpu", sampler, "simple", 1.0).sigmas
    function = comfy.samplers.sampler_object(sampler)
    assert_part(made.sigmas, full, sampling, function)


@pytest.mark.parametrize("sampler", ["dpm_2", "uni_pc"])
@pytest.mark.parametrize("span", [slice(0, 11), slice(10, None), slice(5, 12)])
def test_start_and_end_steps_without_the_last_sigma_but_one(sampler, span):
    full = KSampler(Model("wan"), 20, "cpu", sampler, "simple").sigmas
    function = comfy.samplers.sampler_object(sampler)
    assert_part(full[span], full, SAMPLINGS["wan"], function)


def test_denoise_of_the_nodes_that_make_sigmas():
    sampling = SAMPLINGS["flux"]
    part = BasicScheduler.execute(Model("flux"), "beta", 10, 0.4).result[0]
    assert_part(part, calculate_sigmas(sampling, "beta", 25), sampling)
    full = calculate_sigmas(sampling, "simple", 20)
    high, low = SplitSigmasDenoise.execute(full, 0.6).result
    assert_part(high, full, sampling)
    assert_part(low, full, sampling)


def test_a_small_denoise_has_a_long_schedule():
    sampling = SAMPLINGS["sd15"]
    full = calculate_sigmas(sampling, "karras", 400)
    assert_part(full[-21:], full, sampling)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sd15", AlignYourStepsScheduler.execute("SD1", 10, 1.0).result[0]),
        ("flux", Flux2Scheduler.execute(20, 1024, 1024).result[0]),
        ("sd15", SDTurboScheduler.execute(Model("sd15"), 4, 1.0).result[0]),
        ("wan", ManualSigmas.execute("1.0, 0.8, 0.7, 0.3, 0.2, 0.1, 0.05, 0.02, 0").result[0]),
    ],
)
def test_a_run_from_all_noise_to_none_is_all_of_its_schedule(name, part):
    made = whole(lists(part), SAMPLINGS[name])
    assert (made.sigmas, made.start) == (tuple(lists(part)[:-1]), 0)
    assert made.stop == made.steps


def test_what_no_scheduler_has_is_continued_in_even_shares():
    """Shares of a flow model without a shift are sigma itself: 0.725 to 0.225 in steps of 0.1 make
    ten steps of which the run does five."""
    made = whole([0.725, 0.6, 0.5, 0.4, 0.35, 0.225], flow(1.0))
    assert (made.start, made.stop, made.steps) == (3, 8, 10)
    assert made.sigmas[:4] == pytest.approx([1, 1 - 0.275 / 3, 1 - 0.55 / 3, 0.725], abs=1e-6)
    assert "no scheduler" in made.how
    at = whole(lists(AlignYourStepsScheduler.execute("SD1", 10, 0.5).result[0]), SAMPLINGS["sd15"])
    assert at.start > 0
    assert at.stop == at.steps


@EVERY
@pytest.mark.parametrize(
    "part",
    [[], [0.5], [0.5, 0.0], [0.0, 0.0], [0.5, 0.5, 0.0], [0.9, 0.5, 0.7, 0.1], [0.7, 0.6999],
     [1e9, 1.0, 0.0], [0.3, -0.2], [math.nan, 0.5, 0.0], [1e-9, 0.0]],
)  # fmt: skip
def test_odd_sigmas_make_some_timeline(name, part):
    made = whole(part, SAMPLINGS[name])
    assert 0 <= made.start < made.stop <= made.steps
    assert all(a > b for a, b in zip(made.sigmas, made.sigmas[1:], strict=False))


@EVERY
@pytest.mark.parametrize("part", [[0.7, 0.6999], [0.3, 0.29995, 0.2999]])
def test_steps_too_small_for_any_schedule_do_not_make_a_long_one(name, part):
    """Numbers of steps are looked for up to what people may ask for."""
    made = whole(part, SAMPLINGS[name])
    assert "no scheduler" in made.how
    assert made.steps <= 1000 + len(part)


def test_rising_sigmas_are_told():
    full = calculate_sigmas(SAMPLINGS["flux"], "simple", 10)
    assert "rise" in whole(lists(FlipSigmas.execute(full).result[0]), SAMPLINGS["flux"]).off


@EVERY
def test_a_percentage_is_where_conditionings_begin_at_it(name):
    sampling = SAMPLINGS[name]
    assert limits(sampling, 0.0, 1.0) == (math.inf, 0.0)
    want = sampling.percent_to_sigma(0.2), sampling.percent_to_sigma(0.9)
    assert limits(sampling, 0.2, 0.9) == want


# Whole runs. Every step has the same ratio, so that a run's skips follow from its first step.
RATIO, THRESHOLD, K, RETENTION = 0.98, 0.13, 3, 0.2


def expected(start, stop, steps=20, first=None):
    """Skipped steps by the rule of the paper, the first step of a run having nothing to reuse."""
    first = int(steps * RETENTION) if first is None else first
    made, product, error, length = [], 1.0, 0.0, 0
    for t in range(start, stop):
        product, length = product * RATIO, length + 1
        error += abs(1 - product)
        free = t != start and t >= first and t != steps - 1
        if free and error < THRESHOLD and length <= K:
            made.append(t)
        else:
            product, error, length = 1.0, 0.0, 0
    return made


class Spy(caching.Session):
    made: list = []

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)


@pytest.fixture
def sample(model, monkeypatch):
    """Sample from a tiny Flux; what was decided, evaluation by evaluation, and the session."""
    monkeypatch.setattr(caching, "Session", Spy)
    monkeypatch.setattr(Spy, "made", [])
    text = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(5))
    cond = [[text, {"pooled_output": text[:, 0, :32]}]]

    def run(sampler="euler", steps=20, sigmas=None, scheduler="simple", **more):
        settings = {
            "ratios": "manual", "manual": dict.fromkeys(("cond", "uncond"), (1.0, *(RATIO,) * 19)),
            "k": K, "threshold": THRESHOLD, "retention": RETENTION, **more.pop("settings", {}),
        }  # fmt: skip
        patched = caching.attach(model("flux"), caching.Settings(**settings))
        latent = torch.zeros(1, *samples.SHAPES["flux"])
        noise = comfy.sample.prepare_noise(latent, 3)
        if sigmas is None:
            arguments = noise, steps, 1.0, sampler, scheduler, cond, cond, latent
            made = comfy.sample.sample(patched, *arguments, disable_pbar=True, seed=3, **more)
        else:
            if isinstance(sampler, str):
                sampler = comfy.samplers.sampler_object(sampler)
            arguments = noise, 1.0, sampler, sigmas, cond, cond, latent
            made = comfy.sample.sample_custom(patched, *arguments, disable_pbar=True, seed=3)
        assert made.isfinite().all()
        session = Spy.made[-1] if Spy.made else None
        return (session.tally.rows["cond"], session) if session else ([], None)

    return run


def skipped(rows, session):
    """Steps of the whole schedule."""
    places = [session.timeline.position(sigma) for sigma, *_ in rows]
    assert all(place == int(place) for place in places)
    return [int(p) for p, (_, skip, _) in zip(places, rows, strict=True) if skip]


def test_a_whole_run_skips_what_is_planned(sample):
    rows, session = sample()
    assert skipped(rows, session) == expected(0, 20)
    assert len(rows) == 20


def test_half_the_denoise_is_the_second_half(sample):
    rows, session = sample(steps=10, denoise=0.5)
    assert session.timeline.steps == 20
    assert skipped(rows, session) == expected(10, 20)


@pytest.mark.parametrize("full", [False, True])
def test_two_samplers_do_a_schedule_between_them(sample, full):
    first = sample(start_step=0, last_step=10, force_full_denoise=full)
    second = sample(start_step=10, last_step=20)
    wanted = [t for t in expected(0, 10) if not (full and t == 9)]
    assert skipped(*first) == wanted
    assert first[0][-1][2] == ("last step" if full else "")
    assert skipped(*second) == expected(10, 20)


def test_each_of_two_experts_begins_with_computed_steps(sample):
    """Retention 0.25 of the 8 steps of the first expert and of the 12 of the second."""
    more = {"settings": {"ratios": "wan2.2_t2v_A14B", "retention": 0.25}}
    first, _ = sample(start_step=0, last_step=8, **more)
    second, _ = sample(start_step=8, last_step=20, **more)
    for rows, count in ((first, 2), (second, 3)):
        assert [skip for _, skip, _ in rows[:count]] == [False] * count
        assert [reason for *_, reason in rows[1:count]] == ["retention"] * (count - 1)
        assert rows[count][2] != "retention"


def test_steps_outside_the_percentages_are_computed(sample):
    rows, session = sample(scheduler="sgm_uniform", settings={"start": 0.3, "end": 0.8})
    sampling = session.patcher.get_model_object("model_sampling")
    high, low = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.8)
    outside = [i for i, (sigma, *_) in enumerate(rows) if not low < sigma <= high]
    assert len(outside) > 8
    assert not set(outside) & set(skipped(rows, session))
    assert skipped(rows, session)


def test_rising_sigmas_skip_nothing(sample):
    sigmas = FlipSigmas.execute(calculate_sigmas(SAMPLINGS["flux"], "simple", 12)).result[0]
    assert sample(sigmas=sigmas[:-1]) == ([], None)


def test_a_sampler_that_starts_again_starts_with_nothing(sample):
    fall = calculate_sigmas(SAMPLINGS["flux"], "simple", 12)[:-1]
    rows, _ = sample(sigmas=torch.cat([fall, fall, fall.new_zeros(1)]))
    again = [skip for _, skip, _ in rows[12:]]
    assert not again[0]
    assert again == [skip for _, skip, _ in rows[:12]]
    assert any(again)


def test_repeated_noise_levels_are_decided_once(sample):
    full = calculate_sigmas(SAMPLINGS["flux"], "simple", 20)
    rows, session = sample(sigmas=torch.cat([full[:8], full[7:]]))
    assert session.timeline.steps == 20
    assert rows[7][:2] == rows[8][:2]
    assert [t for t in skipped(rows, session) if t != 7] == [t for t in expected(0, 20) if t != 7]


SAMPLERS = [  # one of each way through the noise levels
    "heun", "heunpp2", "dpm_2", "dpmpp_sde", "dpmpp_2m", "uni_pc", "dpm_adaptive", "dpm_fast",
    "lcm", "exp_heun_2_x0", "seeds_3", "sa_solver_pece",
]  # fmt: skip


@pytest.mark.parametrize("name", [*SAMPLERS, "churn"])
def test_each_noise_level_is_decided_once(sample, name):
    """Whatever the order in which a sampler visits them; and a skip has a residual before it."""
    sampler = name if name != "churn" else comfy.samplers.ksampler("euler", {"s_churn": 4.0})
    sigmas = None if name != "churn" else calculate_sigmas(SAMPLINGS["flux"], "simple", 20)
    rows, session = sample(sampler, sigmas=sigmas)
    places = [session.timeline.position(sigma) for sigma, *_ in rows]
    known = False
    for i, (_, skip, _) in enumerate(rows):
        if i and places[i] == places[i - 1]:
            assert skip == rows[i - 1][1]
        known = known and not (i and places[i - 1] - places[i] > 2)
        assert known or not skip
        known = known or not skip
    assert any(skip for _, skip, _ in rows)
    assert not any(skip for (_, skip, _), place in zip(rows, places, strict=True) if place < 4)
