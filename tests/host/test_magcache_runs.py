"""Runs with MagCache: what is skipped, and that nothing else changes or stays."""

from __future__ import annotations

import logging

import cached
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from adapter_lab.core.cache.trace import Trace
from adapter_lab.nodes.host import cache_session
from adapter_lab.nodes.host.cache_branches import Branches
from adapter_lab.nodes.host.cache_report import REASONS
from cached import KINDS, SKIPPED, conditioning, sample, seen
from comfy.model_patcher import ModelPatcher


@pytest.fixture(scope="module")
def models(model):
    made = {}

    def get(kind):
        if kind != "ltxv":
            return model(kind)
        if kind not in made:
            with torch.inference_mode():
                made[kind] = tiny.ltxv()
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_skipped_as_planned(models, kind, caplog):
    """By hand from the rule; the same bits twice, and the plain model's when the node is gone."""
    model = models(kind)
    plain = sample(model, kind)
    with seen(model, kind) as (watched, watch):
        made = sample(cached.cached(watched), kind)
        assert watch.skipped() == SKIPPED
        again = sample(cached.cached(watched), kind)
    assert torch.equal(made, again) and made.isfinite().all()
    assert not torch.equal(made, plain)
    assert torch.equal(sample(model, kind), plain)
    assert "forward" not in vars(model.model.diffusion_model)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_is_bitwise_that_of_the_plain_model(models, kind):
    """With a threshold that nothing stays below every step is computed, and caught."""
    model = models(kind)
    with seen(model, kind) as (watched, watch):
        made = sample(cached.cached(watched, threshold=1e-9), kind)
    assert watch.skipped() == [] and torch.equal(made, sample(model, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_level(models, kind, monkeypatch):
    told = []
    choose = cache_session.choose
    monkeypatch.setattr(
        cache_session, "choose",
        lambda s, level, *rest, **more: told.append(level) or choose(s, level, *rest, **more),
    )  # fmt: skip
    for wanted in ("auto", "network"):
        sample(cached.cached(models(kind), residual=wanted), kind)
    assert told == [KINDS[kind][1], "network"]


@pytest.mark.parametrize("masked", [False, True])
def test_what_published_lists_may_be_for_is_told(model, masked, monkeypatch):
    """The size of the latent, and what the run goes by beside its prompt."""
    told, choose = {}, cache_session.choose
    monkeypatch.setattr(
        cache_session, "choose", lambda *given, **more: told.update(more) or choose(*given, **more)
    )
    edited = conditioning("flux", 1, reference_latents=[torch.zeros(1, 16, 8, 8)])
    mask = torch.ones(1, 8, 12) if masked else None
    sample(cached.cached(model("flux")), "flux", positive=edited, size=12, noise_mask=mask)
    assert tuple(told["latent"]) == (1, 16, 8, 12) and "reference_latents" in told["uses"]
    assert ("noise_mask" in told["uses"]) is masked
    sample(cached.cached(model("flux")), "flux")
    assert "reference_latents" not in told["uses"]


def test_why_the_first_steps_are_computed(model):
    report = {}
    sample(cached.cached(model("flux"), node_id="7", report=report), "flux")
    reasons = [cell[4] for cell in report["runs"][-1]["strip"]["cond"]]
    assert reasons[:3] == [REASONS["retention"]] * 3 and reasons[-1] == REASONS["last step"]


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({"threshold": 0.0}, 12, "threshold is 0"),
        ({"k": 0}, 12, "k is 0"),
        ({}, 7, "fewer than 8"),
    ],
)
def test_where_nothing_can_be_skipped_that_is_said(model, settings, steps, said, caplog):
    caplog.set_level(logging.INFO)
    flux = model("flux")
    with seen(flux, "flux") as (watched, watch):
        made = sample(cached.cached(watched, **settings), "flux", steps=steps)
    assert said in caplog.text and watch.skipped() == []
    assert torch.equal(made, sample(flux, "flux", steps=steps))


def test_the_last_step_is_skipped_without_its_guard(model):
    """11 follows the skipped 9 and 10: the third of a run, past the threshold; 3 at k 1 is not."""
    with seen(model("flux"), "flux") as (watched, watch):
        sample(cached.cached(watched, guard_last=False, k=1), "flux")
    assert watch.skipped() == [3, 5, 7, 9, 11]


def test_start_and_end(model):
    """Sigmas of this flow model with 12 steps are near 1 - t/12 shifted: the outer are computed."""
    flux = model("flux")
    sampling = flux.model.model_sampling
    with seen(flux, "flux") as (watched, watch):
        sample(cached.cached(watched, start=0.4, end=0.8, retention=0.0), "flux")
    high, low = (float(sampling.percent_to_sigma(p)) for p in (0.4, 0.8))
    sigmas = sorted({sigma for sigma, _, _ in watch.calls}, reverse=True)
    inside = [i for i, sigma in enumerate(sigmas) if low <= sigma <= high]
    assert watch.skipped() and set(watch.skipped()) <= set(inside)
    assert watch.skipped()[0] == inside[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["flux", "sd15"])
def test_one_batch_or_apart(models, kind, cfg, monkeypatch):
    """The same pictures when memory is too short for both conditionings at once."""
    model = models(kind)
    made = []
    for free in (2**40, 0):
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_, free=free: free)
        with seen(model, kind) as (watched, watch):
            made.append(sample(cached.cached(watched), kind, cfg=cfg))
        assert watch.skipped() == SKIPPED
        single = cfg == 1 or not free
        assert {len(told) for _, told, _ in watch.calls} == {1 if single else 2}
    assert torch.allclose(*made, atol=2e-4)


def test_texts_of_different_lengths(model):
    """Stable Diffusion 3 evaluates them one after the other."""
    with seen(model("sd3"), "sd3") as (watched, watch):
        made = sample(cached.cached(watched), "sd3", negative=conditioning("sd3", 2, words=3))
    assert {told for _, told, _ in watch.calls} == {(0,), (1,)}
    assert watch.skipped(0) == watch.skipped(1) == SKIPPED and made.isfinite().all()


def test_cond_and_uncond_have_their_ratios(model):
    """With ratios of 1 one side could skip all of a run, but not in one batch with the other."""
    lists = cached.SETTINGS["manual"] | {"cond": (1.0,) * cached.STEPS}
    for words, cond in ((0, SKIPPED), (3, [3, 4, 5, 6, 8, 9, 10])):
        with seen(model("sd3"), "sd3") as (watched, watch):
            negative = conditioning("sd3", 2, words=words)
            sample(cached.cached(watched, manual=lists), "sd3", negative=negative)
        assert watch.skipped(0) == cond and watch.skipped(1) == SKIPPED


def test_a_conditioning_that_comes_later_and_goes(model):
    """It has no residual where it begins: there it is computed, with whatever is in its batch."""
    late = conditioning("flux", 5, start_percent=0.5)
    early = conditioning("flux", 6, end_percent=0.5)
    positive = conditioning("flux", 1) + late + early
    flux = model("flux")
    with seen(flux, "flux") as (watched, watch):
        made = sample(cached.cached(watched), "flux", positive=positive)
    begins = [i for i, (_, told, _) in enumerate(watch.calls) if len(told) == 4]
    assert made.isfinite().all() and watch.skipped()
    plain = sample(cached.cached(flux, threshold=1e-9), "flux", positive=positive)
    assert torch.equal(plain, sample(flux, "flux", positive=positive)) and not begins


def test_regions(model):
    """Conditionings on a part of the picture: of other sizes, and one handed to the other side."""
    part = {"area": (4, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    positive = conditioning("flux", 1) + conditioning("flux", 5, **part)
    positive += conditioning("flux", 6, mask=mask, set_area_to_bounds=False, mask_strength=1.0)
    flux = model("flux")
    with seen(flux, "flux") as (watched, watch):
        made = sample(cached.cached(watched), "flux", positive=positive)
    assert watch.skipped() == SKIPPED and made.isfinite().all()
    computed = sample(cached.cached(flux, threshold=1e-9), "flux", positive=positive)
    assert torch.equal(computed, sample(flux, "flux", positive=positive))


def test_the_copy_of_a_region_on_the_other_side_is_another_branch(model, monkeypatch):
    """ComfyUI copies it with its uuid: the residuals of both are kept apart."""
    part = {"area": (4, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    keys = []
    get = Branches._branch
    monkeypatch.setattr(Branches, "_branch", lambda self, key: keys.append(key) or get(self, key))
    positive = conditioning("flux", 1) + conditioning("flux", 5, **part)
    sample(cached.cached(model("flux")), "flux", positive=positive)
    uuids = {key[0] for key in keys}
    assert len(set(keys)) == 4 and len(uuids) == 3


def test_three_conditionings(model):
    """DualCFGGuider numbers them in another order than sampling with one guidance does."""
    flux, told = model("flux"), {}
    for cache in (True, False):
        settings = {} if cache else {"threshold": 1e-9}
        with seen(flux, "flux") as (watched, watch):
            guider = custom.Guider_DualCFG(cached.cached(watched, **settings))
            guider.set_conds(*(conditioning("flux", seed) for seed in (1, 5, 2)))
            guider.set_cfg(3.0, 2.0)
            noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
            sampler = comfy.samplers.sampler_object("euler")
            sigmas = comfy.samplers.calculate_sigmas(flux.model.model_sampling, "normal", 12)
            with torch.inference_mode():
                made = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0)
        told[cache] = (watch.skipped(), made.isfinite().all().item())
    assert told == {True: (SKIPPED, True), False: ([], True)}


def test_batches_and_other_sizes(model):
    flux = model("flux")
    node = cached.cached(flux)
    alone = sample(node, "flux")
    pair = sample(node, "flux", batch=2)
    assert pair.shape[0] == 2 and sample(node, "flux", size=12).shape[-1] == 12
    assert torch.equal(sample(node, "flux"), alone)
    assert not torch.equal(pair[:1], pair[1:])


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("heun", 23), ("dpm_2", 23), ("dpmpp_sde", 23), ("heunpp2", 33)]
)
def test_samplers_that_evaluate_more_than_once_a_step(model, sampler, evaluations):
    """A noise level is decided once: the second evaluation there does as the first."""
    with seen(model("flux"), "flux") as (watched, watch):
        made = sample(cached.cached(watched, k=2), "flux", sampler=sampler, cfg=1.0)
    assert len(watch.calls) == evaluations and made.isfinite().all()
    if sampler == "heun":
        assert watch.skipped() == SKIPPED
    decisions = {}
    for before, now in zip(watch.calls, watch.calls[1:], strict=False):
        if before[0] == now[0]:
            decisions.setdefault(now[0], set()).update((before[2], now[2]))
    assert all(len(made) == 1 for made in decisions.values())
    assert 5 <= sum(not ran for _, _, ran in watch.calls) <= evaluations * 2 / 3


def test_a_sampler_that_starts_again(model):
    """Going back to much more noise forgets what was computed at less."""
    flux = model("flux")
    sigmas = comfy.samplers.calculate_sigmas(flux.model.model_sampling, "normal", 12)
    again = torch.cat([sigmas[:-1], sigmas])
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with seen(flux, "flux") as (watched, watch), torch.inference_mode():
        comfy.sample.sample_custom(
            cached.cached(watched), noise, 1.0, comfy.samplers.sampler_object("euler"), again,
            conditioning("flux", 1), conditioning("flux", 2), torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    ran = [ran for _, _, ran in watch.calls]
    assert [i for i in range(12) if not ran[i]] == SKIPPED
    assert [i for i in range(12) if not ran[12 + i]] == SKIPPED


@pytest.mark.parametrize(("back", "kept"), [(1, True), (4, False)])
def test_residuals_from_before_a_restart(model, back, kept, monkeypatch):
    """One step back is a stage of a step (Heun++) and goes on; of what was computed before a
    restart nothing is put in the place of what comes after it."""
    flux, order, fills = model("flux"), {}, []
    put, fill = Trace.put, cache_session.filled

    def counted(self, sigma, parts):
        order[id(parts[0])] = (len(order), parts)  # kept alive: ids stay apart
        put(self, sigma, parts)

    def noted(name, trace, *rest):
        fills.append((len(order), [order[id(parts[0])][0] for _, parts in trace.points]))
        return fill(name, trace, *rest)

    monkeypatch.setattr(Trace, "put", counted)
    monkeypatch.setattr(cache_session, "filled", noted)
    levels = comfy.samplers.calculate_sigmas(flux.model.model_sampling, "normal", 12)
    sigmas = torch.cat([levels[:9], levels[8 - back :]])
    with seen(flux, "flux") as (watched, watch), torch.inference_mode():
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        comfy.sample.sample_custom(
            cached.cached(watched), noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas,
            conditioning("flux", 1), [], torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
    ran = [ran for *_, ran in watch.calls]
    first, later = sum(ran[:9]), [used for at, used in fills if at > sum(ran[:9])]
    assert ran[9] and later and any(min(used) < first for used in later) is kept


def test_the_guard_can_only_refuse(model):
    """The largest change that a skip would have gone by, and a little less."""
    flux, ran = model("flux"), {}
    for guard in (1e9, 1e-9):
        with seen(flux, "flux") as (watched, watch):
            made = sample(cached.cached(watched, guard=guard), "flux")
        ran[guard] = watch.skipped()
        if guard < 1:
            assert torch.equal(made, sample(flux, "flux"))
    assert ran == {1e9: SKIPPED, 1e-9: []}
