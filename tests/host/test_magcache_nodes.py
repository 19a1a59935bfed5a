"""The MagCache nodes: what they refuse, what they promise, and what they tell after sampling."""

from __future__ import annotations

import json
from contextlib import closing, suppress
from types import SimpleNamespace

import comfy.sample
import numpy as np
import pytest
import samples
import tiny
import torch
import websocket
from adapter_lab.core.cache.calibration import Calibration, Curve, write_calibration
from adapter_lab.core.cache.magcache import plan
from adapter_lab.core.cache.text import parse_ratios
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.storage import save_dataset
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.host.caching import Settings, attach
from adapter_lab.nodes.magcache import MagCache
from adapter_lab.nodes.magcache_plan import MagCachePlan
from adapter_lab.tests.server import Server
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from conftest import COMFYUI

STEADY, FALLING = "1" + " 1" * 9, "1" + " 0.9" * 9
GOOD = dict(ratios="auto", manual_ratios="", threshold=-1.0, k=-1, retention=-1.0,
            start_percent=0.0, end_percent=1.0, calibrate="when missing", fill="auto")  # fmt: skip
BAD = {
    "ratios": ({"ratios": "flux_pro"}, "no ratios 'flux_pro'"),
    "text": ({"ratios": "manual", "manual_ratios": "1, 0.9, x"}, "Number 3"),
    "empty": ({"ratios": "manual"}, "empty"),
    "zero": ({"ratios": "manual", "manual_ratios": "1 0"}, "Number 2"),
    "threshold": ({"threshold": -0.5}, "'threshold' is out of range"),
    "nan": ({"threshold": float("nan")}, "'threshold' is out of range"),
    "infinity": ({"threshold": float("inf")}, "'threshold' is out of range"),
    "k": ({"k": -2}, "'k' is out of range"),
    "retention": ({"retention": 1.5}, "'retention' is out of range"),
    "order": ({"start_percent": 0.6, "end_percent": 0.6}, "'start_percent' is not below"),
    "start": ({"start_percent": -0.1}, "'start_percent' is out of range"),
    "guard": ({"guard": -1.0}, "'guard' is out of range"),
    "fill": ({"fill": "magic"}, "Unknown fill 'magic'"),
    "calibrate": ({"calibrate": "sometimes"}, "Unknown calibrate 'sometimes'"),
    "residual": ({"residual": "half"}, "Unknown residual 'half'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_sampling(model, name):
    change, said = BAD[name]
    with pytest.raises(AdapterLabError, match=said):
        MagCache.execute(model("flux"), **{**GOOD, **change})


def test_a_model_without_a_network_is_refused():
    with pytest.raises(AdapterLabError, match="nothing to skip in this MODEL"):
        MagCache.execute(SimpleNamespace(model=torch.nn.Linear(1, 1)), **GOOD)


@pytest.mark.parametrize("kind", [EasyCacheNode, LazyCacheNode])
def test_another_cache_on_the_model_is_refused(model, kind):
    cached = kind.execute(model("flux"), 0.2, 0.15, 0.95, False).args[0]
    with pytest.raises(AdapterLabError, match=f"MagCache and {kind.__name__[:-4]} are on the same"):
        MagCache.execute(cached, **GOOD)


def test_the_model_that_goes_in_is_left_as_it_is(model):
    given = model("flux")
    before = json.dumps(given.model_options, default=str), dict(given.wrappers)
    out = MagCache.execute(given, **GOOD)
    assert out.args[0] is not given and out.args[0].wrappers != given.wrappers
    assert (json.dumps(given.model_options, default=str), dict(given.wrappers)) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [({}, "the next run calibrates"), ({"calibrate": "never"}, "nothing is skipped"),
     ({"calibrate": "always"}, "Every run calibrates"), ({"threshold": 0.0}, "Off: "),
     ({"ratios": "flux_dev"}, "'flux_dev'")],
)  # fmt: skip
def test_says_before_sampling_what_it_will_do(model, change, said):
    assert said in MagCache.execute(model("flux"), **{**GOOD, **change}).ui["text"][0]


def plan_of(**change):
    given = dict(ratios="manual", manual_ratios=FALLING, steps=10, threshold=0.3, k=4,
                 retention=0.2)  # fmt: skip
    return MagCachePlan.execute(**{**given, **change})


def test_plan_is_that_of_the_rule_by_hand():
    """R = 0.9, 0.81: E = 0.1, 0.29, then 0.561 is over 0.3; the first two and the last are kept."""
    report, picture = plan_of().args
    assert report.splitlines()[:2] == [
        "5 of 10 steps computed, 2.00x at best", "cond: 5 skipped: steps 3-4, 6-7, 9",
    ]  # fmt: skip
    assert picture.shape[0] == 1 and picture.shape[-1] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_plan_of_two_branches_skips_what_both_skip():
    """The second, at a ratio of 1, is limited by k alone where it is evaluated by itself."""
    report = plan_of(manual_ratios=f"cond: {FALLING} uncond: {STEADY}").args[0]
    assert report.splitlines()[:4] == [
        "5 of 10 steps computed, 2.00x at best", "cond: 5 skipped: steps 3-4, 6-7, 9",
        "uncond: 6 skipped: steps 3-6, 8-9",
        "both, where one batch has them: 5 skipped: steps 3-4, 6-7, 9",
    ]  # fmt: skip


def test_plan_draws_each_step_as_it_is(model):
    """Row by row, the strip is filled where the step is computed."""
    picture = (plan_of().args[1][0].numpy() * 255).round().astype(np.uint8)
    empty = tuple(picture[95, 84 + int(852 * 0.25)])  # in step 3
    cells = [tuple(picture[95, 84 + int(852 * (t + 0.5) / 10)]) for t in range(10)]
    assert [t for t, colour in enumerate(cells) if colour == empty] == [2, 3, 5, 6, 8]


def test_plan_finds_the_threshold_for_a_speed_up():
    """1.7x of 10 steps is 4 skipped ones at most, each 0.1 off; with k 1 there are never more."""
    report = plan_of(speed_up=1.7, threshold=0.0).args[0]
    assert report.splitlines()[:2] == [
        "6 of 10 steps computed, 1.67x at best", "cond: 4 skipped: steps 3, 5, 7, 9",
    ]  # fmt: skip
    assert "any step less is more than 1.1x" in plan_of(speed_up=1.1).args[0]
    with pytest.raises(AdapterLabError, match=r"A speed-up of 2\.3 is out of reach"):
        plan_of(speed_up=2.3, k=1)


def test_plan_says_what_stands_in_the_way():
    """The least error of a single step is |1 - 0.9|."""
    assert "the least error of a step is 0.1," in plan_of(threshold=0.05).args[0]
    assert "the threshold or k is 0" in plan_of(k=0).args[0]
    assert "below 8 they are too far apart" in plan_of(steps=6).args[0]
    assert "always computed" in plan_of(retention=1.0).args[0]


def test_plan_of_a_published_list_takes_its_settings():
    """Wan 2.1 1.3B: threshold 0.12, k 2, retention 0.2 (its repository's first row)."""
    report = plan_of(ratios="wan2.1_t2v_1.3B", steps=50, threshold=-1.0, k=-1, retention=-1.0)
    assert "threshold 0.12, at most 2 skipped in a row, the first 20 % of" in report.args[0]
    flux = plan_of(ratios="flux_dev", steps=28, threshold=-1.0, k=-1, retention=-1.0).args[0]
    assert "step 12 of 28, or what maps to it, is always computed" in flux


def test_plan_has_no_auto():
    with pytest.raises(AdapterLabError, match="A plan has no model"):
        plan_of(ratios="auto")


def test_calibrations_are_in_both_menus_and_planned():
    curve = Curve(tuple(1 - i / 10 for i in range(10)), (1.0,) + (0.9,) * 9, (0.0,) * 10,
                  (0.0,) * 10)  # fmt: skip
    write_calibration(paths.calibrations() / "mine.json",
                      Calibration("abc", "blocks", "flux", 10, {"cond": curve}, {}))  # fmt: skip
    for node in (MagCache, MagCachePlan):
        menu = next(i for i in node.define_schema().inputs if i.id == "ratios")
        assert "calibrated: mine" in menu.options
        assert node.validate_inputs("calibrated: mine") is True
        assert "no ratios 'calibrated: gone'" in node.validate_inputs("calibrated: gone")
    assert "cond: 5 skipped: steps 3-4, 6-7, 9" in plan_of(ratios="calibrated: mine").args[0]


def test_a_calibration_is_planned_by_what_it_knows():
    """Bends of 10 on even steps of 0.1: a first skip is off by 10 x 0.1 x 0.2, then 10 x 0.1 x 0.3;
    with sizes that never change, magnitudes allow four in a row."""
    flat, sigmas = (1.0,) * 10, tuple(1 - t / 10 for t in range(10))
    curve = Curve(sigmas, flat, (0.0,) * 10, (0.0,) * 10, (10.0,) * 10)
    write_calibration(paths.calibrations() / "bent.json",
                      Calibration("f", "blocks", "flux", 10, {"cond": curve}, {}))  # fmt: skip
    made = plan_of(ratios="calibrated: bent", threshold=0.35).args[0]
    assert "cond: 4 skipped: steps 3, 5, 7, 9" in made and "errors: extrapolation" in made
    made = plan_of(ratios="calibrated: bent", threshold=0.35, errors="magnitude").args[0]
    assert "cond: 6 skipped: steps 3-6, 8-9" in made and "errors: magnitude" in made
    made = plan_of(errors="extrapolation").args[0]
    assert "Nothing is known of errors of extrapolation" in made


# What a run tells


def sampled(patcher, steps, cfg=3.0, sampler="euler", callback=None):
    positive, negative = (
        [[item.cond[None], {name: t[None] for name, t in item.extra.items()}]]
        for item in samples.items("flux", 2)
    )
    noise = torch.randn(1, *samples.SHAPES["flux"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, steps, cfg, sampler, "simple", positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=0, callback=callback,
        )  # fmt: skip


def told(model, steps=12, **settings):
    """The report on the node after one run by manual ratios, and the run in it."""
    report = {}
    given = dict(ratios="manual", manual=parse_ratios(FALLING), threshold=0.3, k=4, retention=0.2,
                 node_id="7", report=report)  # fmt: skip
    sampled(attach(model("flux"), Settings(**{**given, **settings})), steps)
    return report, report["runs"][-1]


def test_the_node_tells_what_the_run_skipped(model):
    _, run = told(model)
    wanted = plan([float(r) for r in FALLING.split()], 12, 0.3, 4, 0.2)
    for branch in ("cond", "uncond"):
        cells = run["strip"][branch]
        assert [cell[0] for cell in cells] == list(range(1, 13))
        assert [t for t, cell in enumerate(cells) if cell[2]] == wanted != []
    computed = 12 - len(wanted)
    assert run["headline"].startswith(
        f"{computed} of 12 steps computed, {12 / computed:.2f}x predicted, "
    )
    assert run["headline"].endswith("x measured")
    facts = dict(run["facts"])
    assert facts["ratios"] == "manual" and facts["fill"] == "first order (auto)"
    assert facts["residual"] == "of the blocks" and facts["errors"] == "magnitude (auto)"
    assert facts["settings"].startswith("threshold 0.3, at most 4 skipped in a row, the first 20 %")


@pytest.mark.parametrize(
    ("steps", "change", "said"),
    [(6, {}, "6 steps, fewer than 8"), (12, {"threshold": 0.0}, "threshold is 0"),
     (12, {"ratios": "auto", "calibrate": "never"}, "No ratios are known")],
)  # fmt: skip
def test_says_why_it_is_off(model, steps, change, said):
    report, run = told(model, steps, **change)
    assert run["headline"].startswith("Off: ") and said in run["headline"]
    assert report["text"].startswith(run["headline"]) and run["strip"] == {}


def test_says_that_it_calibrates_and_what_comes_next(model):
    settings = dict(ratios="auto", threshold=None, k=None, retention=None)
    _, run = told(model, **settings)
    assert run["calibrating"] and run["predicted"] is None
    assert run["headline"] == (
        "Calibrating: 12 of 12 steps computed, to be used from the next run on"
    )
    _, after = told(model, **settings)
    assert not after["calibrating"] and dict(after["facts"])["ratios"].startswith("calibrated: ")
    assert dict(after["facts"])["errors"] == "extrapolation (auto)"


def test_calibrating_in_every_run_is_told(model):
    _, run = told(model, calibrate="always")
    assert run["headline"] == "Calibrating: 12 of 12 steps computed"
    assert any("with always, every run measures anew" in note for note in run["notes"])


def test_says_what_stands_in_the_way_where_nothing_is_skipped(model):
    _, run = told(model, threshold=0.05)
    assert run["headline"] == "Nothing skipped: 12 of 12 steps computed"
    assert run["notes"][-1].startswith(
        "Most often: the error would reach the threshold. To skip more, raise 'threshold'"
    )
    assert "lower 'retention'" in told(model, retention=1.0)[1]["notes"][-1]


def test_a_run_that_is_stopped_says_so(model):
    report = {}
    settings = Settings("manual", parse_ratios(FALLING), 0.3, 4, 0.2, node_id="7", report=report)
    patcher = attach(model("flux"), settings)

    def stop(step, *_):
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampled(patcher, 12, callback=stop)
    (run,) = report["runs"]
    assert run["headline"] == "Stopped: 3 of 5 steps computed" and run["measured"] is None


# In a running ComfyUI


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    tiny.write("flux", base / "models" / "diffusion_models" / "flux.safetensors")
    save_dataset(base / "output" / "adapter_lab" / "datasets" / "noise", samples.dataset("flux"))
    with Server(COMFYUI, base=base) as running:
        yield running


def graph(seed=0, samplers=1, steps=12, **change):
    """API prompt: node 3 is MagCache."""
    values = {**GOOD, "ratios": "manual", "manual_ratios": FALLING, "threshold": 0.3, **change}
    nodes = [
        ("UNETLoader", {"unet_name": "flux.safetensors", "weight_dtype": "default"}),
        ("AdapterLabDatasetLoad", {"name": "noise"}),
        ("AdapterLabDatasetItem", {"dataset": ["1", 0], "index": 0}),
        ("AdapterLabMagCache", {"model": ["0", 0], **values}),
    ]
    common = dict(model=["3", 0], cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
                  steps=steps, positive=["2", 1], negative=["2", 1])  # fmt: skip
    latent = ["2", 0]
    for i in range(samplers):
        nodes.append(("KSampler", {**common, "seed": seed + i, "latent_image": latent}))
        latent = [str(len(nodes) - 1), 0]
    nodes.append(("SaveLatent", {"samples": latent, "filename_prefix": "x"}))
    return {str(i): {"class_type": n, "inputs": values} for i, (n, values) in enumerate(nodes)}


def reports(result, node="3"):
    """What the node was sent to show, in order, each with the id of the job."""
    sent = [data for kind, data in result.messages if kind == "executed" and data["node"] == node]
    return [(data["prompt_id"], data["output"]["adapter_lab"][0]) for data in sent]


def test_the_result_reaches_the_node_the_history_and_the_next_job(server):
    first = server.run(graph(seed=1))
    assert first.ok, first.errors
    _, (job, report) = reports(first)
    (run,) = report["runs"]
    assert run["computed"] == 12 - len(plan([float(r) for r in FALLING.split()], 12, 0.3, 4, 0.2))
    kept = server.get(f"/history/{job}")[job]["outputs"]["3"]["adapter_lab"]
    assert kept == [report] and first.texts["3"] == report["text"]
    second = server.run(graph(seed=2))
    (_, cached), (_, again) = reports(second)
    assert len(cached["runs"]) == 1, "the node did not run again: it shows what was last"
    assert len(again["runs"]) == 1 and again["prompt"] != job


def test_two_samplers_of_a_graph_are_both_told(server):
    result = server.run(graph(seed=3, samplers=2))
    assert result.ok, result.errors
    assert len(reports(result)[-1][1]["runs"]) == 2


def test_of_two_nodes_that_are_alike_each_tells_its_own(server):
    prompt = graph(seed=5, samplers=2)
    prompt["9"] = prompt["3"]
    prompt["5"]["inputs"]["model"] = ["9", 0]
    result = server.run(prompt)
    assert result.ok, result.errors
    assert [len(reports(result, node)[-1][1]["runs"]) for node in ("3", "9")] == [1, 1]


def test_other_clients_are_told_nothing(server):
    """Neither of another client's job nor of one that a script queued without a name."""
    address = f"{server.address.replace('http', 'ws')}/ws?clientId=bystander"
    with closing(websocket.create_connection(address, timeout=2)) as bystander:
        server.run(graph(seed=6))
        job = server.post("/prompt", {"prompt": graph(seed=7)})["prompt_id"]
        kinds = []
        with suppress(websocket.WebSocketTimeoutException):
            while True:
                kinds.append(json.loads(bystander.recv())["type"])
    assert "status" in kinds and "executed" not in kinds
    assert len(server.get(f"/history/{job}")[job]["outputs"]["3"]["adapter_lab"][0]["runs"]) == 1


def test_a_line_in_the_log(server):
    server.run(graph(seed=4, steps=5))
    assert "MagCache: Off: 5 steps, fewer than 8" in server.log


def test_unknown_ratios_are_refused_by_name(server):
    result = server.run(graph(ratios="calibrated: gone"))
    assert "There are no ratios 'calibrated: gone'" in json.dumps(result.errors)
