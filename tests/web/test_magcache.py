"""What MagCache shows on its node, and the plan, in both renderers."""

from __future__ import annotations

from frontend import FrontEnd
from playwright.sync_api import Locator, expect

MODEL = "adapter_lab_demo_flux.safetensors"
FALLING = "1" + " 0.9" * 9
LOADER = ("UNETLoader", {"unet_name": MODEL})
MANUAL = {"ratios": "manual", "manual_ratios": FALLING, "threshold": 0.3, "k": 4, "retention": 0.2}
LINKS = [(0, "MODEL", 1, "model"), (1, "model", 6, "model"), (2, "dataset", 3, "dataset"),
         (2, "dataset", 4, "dataset"), (3, "CONDITIONING", 6, "positive"),
         (4, "CONDITIONING", 6, "negative"), (5, "LATENT", 6, "latent_image"),
         (6, "LATENT", 7, "samples")]  # fmt: skip
SKIPPED = [2, 3, 5, 6, 8]  # at E = 0.1, 0.29 and then 0.561 over 0.3; the last is computed
SEND = """([kind, detail]) => window.comfyAPI.api.api.dispatchEvent(
  new CustomEvent(kind, { detail }))"""


def build(front: FrontEnd, steps: int = 10, seed: int = 0, **change: object) -> int:
    """A graph that samples the demo model; the id of MagCache."""
    sampler = {"steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
               "seed": seed}  # fmt: skip
    nodes = [LOADER, ("AdapterLabMagCache", {**MANUAL, **change}),
             ("AdapterLabDatasetLoad", {"name": "demo_prompts"}),
             ("AdapterLabDatasetItem", {"index": 6}), ("AdapterLabDatasetItem", {"index": 0}),
             ("EmptySD3LatentImage", {"width": 64, "height": 64}), ("KSampler", sampler),
             ("SaveLatent", {})]  # fmt: skip
    return front.build(nodes, LINKS)[1]


def cells(panel: Locator) -> list[list[str]]:
    """The kind of each cell, row by row."""
    found = panel.locator("svg.strip rect").evaluate_all(
        "(all) => all.map((cell) => [cell.getAttribute('class'), Math.round(cell.getBBox().x)])"
    )
    rows: list[list[str]] = []
    last = float("inf")
    for kind, x in found:
        if x < last:
            rows.append([])
        rows[-1].append(kind)
        last = x
    return rows


def test_shows_what_was_skipped_and_why(front: FrontEnd) -> None:
    node = build(front)
    kind, data = front.run()
    assert kind == "execution_success", data
    front.look_at(node)
    panel = front.report(node)
    expect(panel.locator(".verdict.all")).to_contain_text("5 of 10 steps computed, 2.00x predicted")
    front.screenshot("magcache")
    wanted = ["skipped" if t in SKIPPED else "computed" for t in range(10)]
    assert cells(panel) == [wanted, wanted]
    assert panel.locator("svg.strip text").all_text_contents()[:2] == ["cond", "uncond"]
    titles = panel.locator("svg.strip rect title").evaluate_all(
        "(all) => all.map((title) => title.textContent)"
    )
    assert titles[0].startswith("step 1, sigma 1: computed")
    assert titles[2].endswith(": skipped")
    assert titles[4].endswith(": computed, the error would reach the threshold")
    assert titles[9].endswith(": computed, the last step")
    expect(panel.locator("dd").first).to_have_text("manual")
    heights = panel.locator("svg.strip rect").evaluate_all(
        "(all) => all.slice(1, 3).map((cell) => cell.getBBox().height)"
    )
    assert heights[0] > 5 * heights[1] > 0, "not told by colour alone"


def test_stays_after_undo_and_in_another_tab(front: FrontEnd) -> None:
    node = build(front, seed=1)
    assert front.run()[0] == "execution_success"
    front.report(node).evaluate("(element) => element.id = 'before'")
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    front.js(
        f"() => {{ {tracker}.captureCanvasState();"
        f" app.graph.getNodeById({node}).pos = [0, 500]; {tracker}.captureCanvasState() }}"
    )
    front.js(f"async () => await {tracker}.undo()")
    front.page.wait_for_timeout(1000)
    assert front.page.locator("#before").count() == 0, "undo did not build the nodes anew"
    expect(front.report(node).locator("svg.strip")).to_be_attached()
    command = "async (name) => await app.extensionManager.command.execute(name)"
    front.js(command, "Comfy.NewBlankWorkflow")
    front.page.wait_for_timeout(1000)
    front.js(command, "Workspace.PreviousOpenedWorkflow")
    front.page.wait_for_timeout(1500)
    expect(front.report(node).locator("svg.strip")).to_be_attached()


def test_says_why_nothing_is_skipped(front: FrontEnd) -> None:
    node = build(front, steps=4, seed=2)
    front.run()
    front.look_at(node)
    verdict = front.report(node).locator(".verdict.partly")
    expect(verdict).to_have_text("Off: 4 steps, fewer than 8: too far apart to skip any")
    front.screenshot("magcache-off")


def test_a_calibrating_run_says_what_comes_next(front: FrontEnd) -> None:
    node = build(front, seed=3, ratios="auto", threshold=-1, k=-1, retention=-1, calibrate="always")
    front.run()
    front.look_at(node)
    panel = front.report(node)
    expect(panel.locator(".verdict.partly")).to_have_text("Calibrating: 10 of 10 steps computed")
    expect(panel).to_contain_text("Stored as 'flux-")
    expect(panel).to_contain_text("with always, every run measures anew")
    front.screenshot("magcache-calibrating")


def test_a_long_run_of_many_windows_is_readable(front: FrontEnd) -> None:
    (node,) = front.build([("AdapterLabMagCache", {})], [])
    strip = [[t + 1, 1 - t / 200, 40 * (t % 3 > 0) - 10 * (t % 3 == 1), 40, ""] for t in range(200)]
    run = {"headline": "67 of 200 steps computed", "off": "", "calibrating": False, "schedule": 200,
           "stopped": False, "skipped": 99,
           "notes": ["Ignored. The calibration is damaged"], "facts": [["ratios", "manual"]],
           "strip": {"cond": strip, "uncond": strip}}  # fmt: skip
    output = {"adapter_lab": [{"text": "67 of 200 steps computed", "runs": [run, run]}]}
    front.js(SEND, ["executed", {"node": str(node), "display_node": str(node), "output": output,
                                 "prompt_id": "x"}])  # fmt: skip
    front.look_at(node)
    panel = front.report(node)
    assert cells(panel)[0][:3] == ["computed", "partly", "skipped"]
    assert len(cells(panel)) == 4, "two runs of two branches"
    title = panel.locator("svg.strip rect title").nth(1).text_content()
    assert title == "step 2, sigma 0.995: 30 of 40 evaluations skipped"
    assert panel.bounding_box()["height"] < 420
    expect(panel.locator("pre").first).to_have_text("Ignored. The calibration is damaged")
    front.screenshot("magcache-long")


def test_the_plan_is_drawn(front: FrontEnd) -> None:
    given = {**MANUAL, "steps": 10}
    nodes = [("AdapterLabMagCachePlan", given), ("PreviewImage", {})]
    node, _ = front.build(nodes, [(0, "plot", 1, "images")])
    kind, data = front.run()
    assert kind == "execution_success", data
    front.look_at(node, 1.0)
    expect(front.report(node)).to_contain_text("5 skipped: steps 3-4, 6-7, 9")
    front.screenshot("magcache-plan")
