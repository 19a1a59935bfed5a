"""A training run on the node while it goes on: what the server sends becomes figures and curves."""

from __future__ import annotations

import math

import pytest
from frontend import FrontEnd
from PIL import Image
from playwright.sync_api import expect

SEND = """([kind, detail]) => window.comfyAPI.api.api.dispatchEvent(
  new CustomEvent(kind, { detail }))"""


def state(node: int, step: int, points: list, **more: object) -> dict:
    return {
        "node": str(node), "step": step, "steps": 40, "start": 0, "loss": 0.5, "smooth": 0.75,
        "rate": 1e-4, "norm": 0.125, "per_second": 2.0, "left": 3723, "memory": 5 * 2**30,
        "points": points, "validation": [], "text": "", **more,
    }  # fmt: skip


@pytest.fixture
def node(front: FrontEnd) -> int:
    return front.build([("AdapterLabTrain", {})], [])[0]


def test_shows_figures_and_curve_as_steps_come(front: FrontEnd, node: int) -> None:
    panel = front.report(node)
    points = [[i, math.exp(-i / 10), math.exp(-i / 10) + 0.1] for i in range(1, 11)]
    front.js(SEND, ["adapter_lab.training", state(node, 10, points, validation=[[0, 1.25]])])
    front.look_at(node)
    figures = panel.get_by_role("status")
    expect(figures).to_contain_text("step 10 of 40")
    for text in ("loss 0.5000", "mean 0.7500", "rate 1.00e-4", "gradient 0.125",
                 "speed 2.00 steps/s", "left 1:02:03", "memory 5.0 GiB",
                 "held-out 1.2500"):  # fmt: skip
        expect(figures).to_contain_text(text)
    line = panel.locator("polyline.batch")
    ends = [float(pair.split(",")[0]) for pair in line.get_attribute("points").split()]
    assert len(ends) == 10 and ends[-1] < 38 + (312 - 38) / 2, "a quarter of the run is done"
    later = [[i, 0.3, 0.3] for i in range(11, 41)]
    front.js(SEND, ["adapter_lab.training", state(node, 40, later, loss=None, per_second=0.25)])
    expect(figures).to_contain_text("speed 4.00 s/step")
    expect(figures).not_to_contain_text("loss")
    assert len(line.get_attribute("points").split()) == 40
    front.screenshot("live-training")


def test_a_run_that_starts_anew_draws_a_new_curve(front: FrontEnd, node: int) -> None:
    panel = front.report(node)
    front.js(SEND, ["adapter_lab.training", state(node, 30, [[30, 0.5, 0.5], [29, 0.5, 0.5]])])
    front.js(SEND, ["adapter_lab.training", state(node, 1, [[1, 0.9, 0.9]])])
    expect(panel.locator("polyline.batch")).to_have_attribute("points", "44.9,58.0")


def test_shows_previews_latest_first(front: FrontEnd, node: int) -> None:
    folder = front.server.base / "output" / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    for step in (0, 10):
        name = f"{step}.png"
        Image.new("RGB", (8, 8), (200, step, 0)).save(folder / name)
        image = {"filename": name, "subfolder": "previews", "type": "output"}
        detail = {"node": str(node), "step": step, "images": [image]}
        front.js(SEND, ["adapter_lab.preview", detail])
    front.look_at(node)
    panel = front.report(node)
    assert panel.locator("figcaption").all_inner_texts() == ["step 10", "step 0"]
    sizes = "(images) => images.map((image) => image.naturalWidth)"
    front.page.wait_for_timeout(500)
    assert panel.locator("figure img").evaluate_all(sizes) == [8, 8]
    front.screenshot("live-previews")


def test_an_error_stands_above_what_was_reached(front: FrontEnd, node: int) -> None:
    panel = front.report(node)
    front.js(SEND, ["adapter_lab.training", state(node, 3, [[3, 0.5, 0.5]])])
    front.js(SEND, ["execution_interrupted", {"node_id": str(node), "executed": []}])
    expect(panel.locator(".verdict.failed")).to_contain_text("Cancelled")
    expect(panel.get_by_role("status")).to_contain_text("step 3 of 40")
