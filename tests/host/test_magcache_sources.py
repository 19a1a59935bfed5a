"""Where a run's ratios come from: a calibration, the user, or published ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import tiny
import torch
from adapter_lab.core.cache.known import DEFAULTS
from adapter_lab.core.cache.published import published
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import caching, ratios
from calibrated import STEPS, ask, steps, store


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def flux_dev():
    """The published model's shapes, without weights."""
    config = comfy.supported_models.Flux({
        **tiny.FLUX, "image_model": "flux", "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
        "guidance_embed": True,
    })  # fmt: skip
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, "", device="meta")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def test_published_ratios_are_those_of_the_model(flux_dev):
    made = ask(flux_dev, timeline=steps(28))
    assert made.name == "published flux_dev" and not made.off and not made.calibrating
    assert (made.rule.threshold, made.rule.k, made.rule.retention) == (0.24, 5, 0.1)
    assert made.rule.special.forced == (11, 28)
    assert tuple(made.ratios("cond")) == published("flux_dev").cond == tuple(made.ratios("uncond"))
    assert made.bends("cond") is None and made.errors == "magnitude"
    assert any("flux_kontext_dev" in note for note in made.notes)


def test_published_ratios_are_those_of_the_task(flux_dev):
    assert ask(flux_dev, uses=["reference_latents"]).name == "published flux_kontext_dev_20"


def test_published_ratios_are_not_for_the_network(flux_dev, model):
    made = ask(flux_dev, level="network")
    assert made.calibrating and "published flux_dev" in "".join(made.notes)
    named = caching.Settings(ratios="wan2.1_t2v_1.3B")
    made = ask(model("flux"), named, level="network")
    assert made.calibrating and "published wan2.1_t2v_1.3B" in "".join(made.notes)


def test_published_ratios_know_nothing_of_extrapolation(flux_dev, model):
    settings = caching.Settings(errors="extrapolation")
    assert ask(flux_dev, settings).calibrating
    made = ask(flux_dev, replace(settings, calibrate="never"))
    assert made.name == "published flux_dev" and made.bends("cond") is None
    assert made.rule.threshold == 0.24 and "extrapolation" in "".join(made.notes)
    store(model("flux"))
    made = ask(model("flux"), settings)
    assert list(made.bends("cond")) == pytest.approx([0.5] * STEPS)
    assert made.rule.threshold == DEFAULTS["extrapolation"].threshold


def test_a_calibration_of_the_model_comes_first(flux_dev):
    path = store(flux_dev)
    made = ask(flux_dev)
    assert made.name == f"calibrated: {path.stem}" and not made.notes
    assert made.ratios("uncond") == pytest.approx([1.0] + [0.9] * (STEPS - 1))
    # Twice as many steps: each changes half as much, on a logarithmic scale.
    assert ask(flux_dev, timeline=steps(20)).ratios("cond") == pytest.approx(
        [1.0] + [0.9**0.5] * 19
    )


@pytest.mark.parametrize("fill, errors", [
    ("auto", "extrapolation"), ("first order", "extrapolation"), ("scaled", "magnitude"),
    ("reuse", "magnitude"),
])  # fmt: skip
def test_errors_are_those_of_the_fill(model, fill, errors):
    store(model("flux"))
    made = ask(model("flux"), caching.Settings(fill=fill))
    assert made.errors == errors and made.rule.threshold == DEFAULTS[errors].threshold
    assert (made.bends("cond") is None) == (errors == "magnitude") and not made.notes
    wanted = caching.Settings(fill=fill, errors="magnitude")
    assert ask(model("flux"), wanted).errors == "magnitude"


def test_errors_that_nobody_measured_are_not_gone_by(model):
    path = store(model("flux"), bends=())
    made = ask(model("flux"))
    assert made.name == f"calibrated: {path.stem}" and not made.notes
    assert (made.errors, made.rule.threshold) == ("magnitude", DEFAULTS["magnitude"].threshold)
    assert ask(model("flux"), caching.Settings(errors="extrapolation")).calibrating
    with pytest.raises(AdapterLabError, match="Unknown errors 'else'"):
        ask(model("flux"), caching.Settings(errors="else"))


def test_what_is_not_known_is_calibrated_or_not(model):
    made = ask(model("wan"))
    assert made.calibrating and made.name == "calibrating" and not made.notes
    made = ask(model("wan"), caching.Settings(calibrate="never"))
    assert not made.calibrating and "never" in made.off and made.name == "none"


@pytest.mark.parametrize("name", ["auto", "manual", "flux_dev"])
def test_always_calibrates(model, name):
    store(model("flux"))
    made = ask(model("flux"), caching.Settings(ratios=name, calibrate="always"))
    assert made.calibrating


def test_settings_of_the_user_replace_the_recommended(model):
    name = "wan2.1_i2v_480p_14B"
    quality, fast = published(name).settings
    made = ask(model("wan"), caching.Settings(ratios=name))
    assert (made.rule.threshold, made.rule.k) == (quality.threshold, quality.k) == (0.12, 4)
    (note,) = made.notes
    assert f"threshold {fast.threshold:g}, k {fast.k:g}" in note
    made = ask(model("wan"), caching.Settings(ratios=name, threshold=0.3, k=-1, retention=0.0))
    assert (made.rule.threshold, made.rule.k, made.rule.retention) == (0.3, 4, 0.0)
    made = ask(model("wan"), caching.Settings(ratios=name, threshold=0.3, k=1, retention=0.5))
    assert (made.rule.threshold, made.rule.k, made.rule.retention) == (0.3, 1, 0.5)
    assert not made.notes


@pytest.mark.parametrize("name, value", [
    ("threshold", float("nan")), ("threshold", -0.5), ("threshold", float("inf")), ("k", -2),
    ("retention", 1.5), ("retention", float("nan")),
])  # fmt: skip
def test_settings_out_of_range(model, name, value):
    with pytest.raises(AdapterLabError, match=f"'{name}' is out of range"):
        ask(model("flux"), caching.Settings(ratios="flux_dev", **{name: value}))


def test_manual_ratios(model):
    lists = {"cond": (1.0, 0.9), "uncond": (1.0, 0.8)}
    made = ask(model("flux"), caching.Settings(ratios="manual", manual=lists))
    assert made.name == "manual" and made.ratios("cond") == [1.0] * 5 + [0.9] * 5
    assert made.ratios("uncond") == [1.0] * 5 + [0.8] * 5
    assert made.notes == ["2 ratios for 10 steps: each step has the nearest one's"]
    pasted = dict.fromkeys(lists, published("flux_dev").cond)
    made = ask(model("flux"), caching.Settings(ratios="manual", manual=pasted))
    assert made.rule.special.forced == (11, 28)


def test_names_that_nobody_has(model, folders):
    path = store(model("flux"))
    shutil.copy(path, path.parents[1] / "outside.json")
    for name in ("flux_dev2", "calibrated: nothing", "calibrated: ../outside", "calibrated: "):
        with pytest.raises(AdapterLabError):
            ask(model("flux"), caching.Settings(ratios=name))
    near = caching.Settings(ratios=f"calibrated: {path.stem[:-1]}")
    with pytest.raises(AdapterLabError, match=f"expected such as {path.stem}\\."):
        ask(model("flux"), near)


def test_menu_lists_whole_calibrations_only(model):
    assert ratios.calibration_names() == []
    path = store(model("flux"))
    store(model("flux"), name="my own")
    (path.parent / ".adapter_lab-0.tmp").write_text("")
    (path.parent / ".hidden.json").write_text("")
    assert ratios.calibration_names() == [f"calibrated: {path.stem}", "calibrated: my own"]


def test_a_shared_calibration_is_used_and_warned_about(model):
    store(model("flux"), name="shared")
    settings = caching.Settings(ratios="calibrated: shared")
    made = ask(model("flux"), settings)
    assert made.name == "calibrated: shared" and not made.notes
    made = ask(model("wan"), settings)
    assert made.name == "calibrated: shared" and "another model" in made.notes[0]
    with pytest.raises(AdapterLabError, match="residuals of the blocks.*Set 'residual' to blocks"):
        ask(model("flux"), settings, level="network")


@pytest.mark.parametrize("text", ["", "{}", "[1", json.dumps({"format": "adapter_lab.magcache"})])
def test_a_damaged_calibration_is_ignored(model, text):
    path = store(model("flux"))
    path.write_text(text)
    for name in ("auto", f"calibrated: {path.stem}"):
        made = ask(model("flux"), caching.Settings(ratios=name))
        (note,) = made.notes
        assert made.calibrating and path.name in note


def test_a_calibration_under_a_name_that_is_not_its_own_is_ignored(model):
    path = store(model("flux"), level="network", name=store(model("flux")).stem)
    assert "another level" in ask(model("flux")).notes[0]
    shutil.copy(store(model("wan")), path)
    made = ask(model("flux"))
    assert made.calibrating and "another model" in made.notes[0]


@pytest.mark.parametrize("start, stop, is_used", [(0, 5, True), (2, 7, False), (5, 10, False)])
def test_a_calibration_is_for_its_noise_levels(model, start, stop, is_used):
    path = store(model("flux"), first=1.0, last=0.6)
    made = ask(model("flux"), timeline=steps(STEPS, start, stop))
    assert made.calibrating != is_used
    assert ("noise levels 1 to 0.6 only" in "".join(made.notes)) != is_used
    for settings in (
        caching.Settings(calibrate="never"), caching.Settings(ratios=f"calibrated: {path.stem}")
    ):  # fmt: skip
        made = ask(model("flux"), settings, timeline=steps(STEPS, start, stop))
        assert made.known is not None
        assert ("noise levels 1 to 0.6 only" in "".join(made.notes)) != is_used


def test_a_longer_schedule_is_calibrated_although_it_ends_lower(model):
    store(model("flux"))
    assert not ask(model("flux"), timeline=steps(20)).calibrating
    assert not ask(model("flux"), timeline=steps(50)).calibrating


def test_a_run_of_two_steps_calibrates_nothing(model):
    made = ask(model("flux"), timeline=steps(20, 18))
    assert not made.calibrating and "2 steps" in made.off
