"""Post-hoc EMA on what Train Adapter leaves on disk."""

from __future__ import annotations

import math
import os

import comfy.model_management
import numpy as np
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter, write_adapter
from adapter_lab.core.merge.ema import Settings, plan, solve, weights
from adapter_lab.nodes.ema import PostHocEMA
from adapter_lab.nodes.ema_plot import average_plot
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.save import SaveAdapter
from test_trainer import output, run

DEFAULTS = dict(
    checkpoints="", profile="reconstruct", sigma_rel=0.15, beta=0.95, beta2=0.0, order="step",
    first=0, last=0,
)  # fmt: skip


def execute(**options):
    return PostHocEMA.execute(**{**DEFAULTS, **options})


@pytest.fixture
def trained(load):
    """A model and the files of a run on it: steps 2, 4 and 6 with their averages."""
    model = load("flux")
    run(model, "flux", steps=6, config={"save_every": 2})
    return model, paths.run("run")


def expected(files, found):
    stored = [read_adapter(path) for path in files]
    return {k: sum(w * s[k].double() for w, s in zip(found, stored, strict=True))
            for k in stored[0]}  # fmt: skip


def assert_near(adapter, values):
    assert adapter.keys() == values.keys()
    for key, value in values.items():
        assert torch.allclose(adapter[key].double(), value, rtol=1e-4, atol=1e-7), key


def test_a_run_is_reconstructed_and_used(trained):
    model, its = trained
    adapter, report, picture = execute(run=its).args
    snapshots = [(step, s) for step in (2, 4, 6) for s in (0.05, 0.1)]
    files = [its.ema(step, s) for step, s in snapshots]
    values = expected(files, solve(snapshots, 0.15, 6))
    last = read_adapter(its.checkpoint(6))
    for key in values.keys() & {k for k in last if k.endswith(".alpha")}:
        values[key] = last[key].double()
    assert_near(adapter, values)
    assert adapter.metadata["ss_steps"] == "6" and "step 2 to 6" in report
    assert picture.shape == (1, 720, 1280, 3) and 0 <= picture.min() < picture.max() <= 1
    applied = host.apply(model, None, adapter, 1.0, 1.0, "error").model
    assert not torch.allclose(output(applied, "flux"), output(model, "flux"), atol=1e-5)
    (path,) = SaveAdapter.execute(adapter, "mean", "comfyui", "keep", "").args
    assert_near(read_adapter(path), {k: t.double() for k, t in adapter.items()})


def test_ordinary_checkpoints_of_a_run(trained):
    _, its = trained
    files = [its.checkpoint(step) for step in (2, 4, 6)]
    adapter, report, _ = execute(run=its, profile="power", sigma_rel=0.2).args
    assert_near(adapter, expected(files, weights([2, 4, 6], sigma_rel=0.2)))
    assert "ema0." not in report
    halved, report, _ = execute(run=its, profile="musubi beta", beta=0.5, last=4).args
    assert_near(halved, expected(files[:2], [0.5, 0.5]))
    assert "outside step 2 to 4" in report
    chosen, _, _ = execute(run=its, profile="musubi beta", beta=0.5, beta2=0.25,
                           checkpoints="*step0000000?.safetensors").args  # fmt: skip
    assert_near(chosen, expected(files, [0.125, 0.125, 0.75]))


def test_files_below_the_folders_of_adapters(trained, folders):
    _, its = trained
    found = execute(checkpoints="run/*.safetensors", profile="power", sigma_rel=0.2).args[0]
    files = [its.checkpoint(step) for step in (2, 4, 6)]
    assert_near(found, expected(files, weights([2, 4, 6], sigma_rel=0.2)))
    tracked = execute(checkpoints=f"{folders}/adapter_lab/runs/run/*-ema*").args[0]
    assert_near(execute(run=its).args[0], {k: t.double() for k, t in tracked.items()})
    # The folder of this name that loaders list has no tracked averages.
    named = execute(checkpoints="run").args[0]
    assert_near(named, {k: t.double() for k, t in tracked.items()})
    with pytest.raises(AdapterLabError, match=r"Nothing matches 'walk/\*'.*loras.*runs"):
        execute(checkpoints="walk/*", profile="power")


def test_averaged_products(trained):
    _, its = trained
    adapter, report, _ = execute(run=its, profile="power", products=True).args
    last = read_adapter(its.checkpoint(6))
    assert {k: t.shape for k, t in adapter.items()} == {k: t.shape for k, t in last.items()}
    assert "factored anew" in report
    assert not torch.equal(next(iter(adapter.values())), next(iter(last.values())))


def test_runs_without_averages(load):
    run(load("flux"), "flux", ema_tracking=False)
    its = paths.run("run")
    with pytest.raises(AdapterLabError, match=r"tracked no averages.*ema_tracking.*'power'"):
        execute(run=its)
    assert execute(run=its, profile="power").args[0]


@pytest.mark.parametrize(("options", "part"), [
    ({}, "neither a run"),
    ({"run": "missing"}, "no files"),
    ({"run": "there", "sigma_rel": 0.3, "profile": "power"}, "0.2886"),
    ({"run": "there", "sigma_rel": 0.0, "profile": "musubi power"}, "0.2886"),
    ({"run": "there", "first": 3, "profile": "power"}, "No checkpoint"),
    ({"run": "there", "first": 2, "profile": "power"}, "only 'there-step"),
])  # fmt: skip
def test_nothing_to_average(options, part):
    there = paths.run("there")
    for step in (1, 2):
        write_adapter(there.checkpoint(step), {"a.diff": torch.ones(2) * step})
    given = {**options, **({"run": paths.run(options["run"])} if "run" in options else {})}
    with pytest.raises(AdapterLabError, match=part):
        execute(**given)


def test_new_checkpoints_are_noticed(folders):
    def told():
        return PostHocEMA.fingerprint_inputs(**{**DEFAULTS, "checkpoints": "style/*"})

    def put(step):
        path = folders / "loras" / "style" / f"style-{step:06}.safetensors"
        write_adapter(path, {"a.diff": torch.ones(2) * step})
        return path

    assert "Nothing matches" in told()
    put(1)
    one = told()
    put(2)
    two = told()
    assert len(one) == 1 and len(two) == 2 and told() == two
    os.utime(put(2), (5, 5))
    assert told() != two
    assert math.isnan(PostHocEMA.fingerprint_inputs(**{**DEFAULTS, "checkpoints": None}))


def test_the_cancel_button_ends_it(trained):
    _, its = trained
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        execute(run=its)


def lit(picture, colour):
    """How many pixels have a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs((picture[0].numpy() * 255).round() - wanted) < 1.5).all(-1).sum())


def test_pictures_of_all_profiles(folders):
    folder = folders / "loras"
    for step in (10, 20, 50):
        write_adapter(folder / f"a-{step}.safetensors", {"a.diff": torch.ones(2) * step})
        for s in (0.05, 0.1):
            path = folder / f"a-{step}-ema{s:.3f}.safetensors"
            write_adapter(path, {"a.diff": torch.ones(2) * step})
    files = sorted(folder.iterdir())
    seen = []
    for profile in ("reconstruct", "power", "musubi power", "musubi beta"):
        made = plan(files, profile, Settings(0.13, 0.8))
        seen.append(average_plot(made))
        # Two widths of tracked averages are told apart; the chosen curve is drawn in ink.
        upper = seen[-1][:, :360, :640]
        assert (lit(upper, "#ebcb8b") > 50) == (profile == "reconstruct")
        assert lit(upper, "#88c0d0") > 50
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
