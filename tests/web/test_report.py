"""The report on the node, in both renderers."""

from __future__ import annotations

import re

import pytest
import torch
from frontend import FrontEnd
from playwright.sync_api import expect
from safetensors.torch import save_file

MODEL = "adapter_lab_demo_flux.safetensors"
FITS = ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2"]
SHAPES = {"qkv": (384, 128), "linear1": (896, 128), "linear2": (128, 640)}


def write_adapter(front: FrontEnd, name: str, modules: list[str]) -> str:
    """File name of a LoRA of rank 2 that fits the demo model where that has `modules`."""
    tensors = {}
    for module in modules:
        out, width = SHAPES[module.rpartition(".")[2]]
        tensors[f"diffusion_model.{module}.lora_down.weight"] = torch.ones(2, width)
        tensors[f"diffusion_model.{module}.lora_up.weight"] = torch.zeros(out, 2)
    folder = front.server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    front.js("async () => await app.refreshComboInNodes()")
    return f"{name}.safetensors"


def load(front: FrontEnd, file: str) -> int:
    """A graph that loads `file`; id of its loader."""
    nodes = [("UNETLoader", {"unet_name": MODEL}), ("AdapterLabLoader", {"adapter_name": file}),
             ("PreviewAny", {})]
    links = [(0, "MODEL", 1, "model"), (1, "report", 2, "source")]
    return front.build(nodes, links)[1]


def test_shows_what_matched_again_when_cached(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", FITS))
    panel = front.report(node)
    expect(panel).to_contain_text("Reports here after a run")
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    front.screenshot("report-all")
    expect(panel.locator(".verdict.all")).to_contain_text("3 of 3 modules matched (LoRA rank 2")
    expect(panel).to_be_visible()
    panel.evaluate("(element) => element.replaceChildren()")
    assert front.run()[0] == "execution_success"
    expect(panel.locator(".verdict.all")).to_contain_text("3 of 3 modules matched")


def test_lists_what_did_not_match(front: FrontEnd) -> None:
    wrong = [f"single_blocks.{i}.linear1" for i in range(10, 30)]
    node = load(front, write_adapter(front, f"partly-{front.renderer}", FITS + wrong))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    panel = front.report(node)
    expect(panel.locator(".verdict.partly")).to_contain_text("3 of 23 modules matched")
    expect(panel).to_contain_text("Not applied:")
    panel.locator("summary").click()
    front.screenshot("report-partly")
    expect(panel.locator(".missed")).to_have_count(20)
    expect(panel.locator(".missed").last).to_contain_text("single_blocks.29.linear1: ")
    tall, seen = panel.evaluate("(e) => [e.scrollHeight, e.clientHeight]")
    assert tall > seen > 60
    below = "(e) => e.getBoundingClientRect().bottom"
    bottom = front.js("(id) => { const n = app.graph.getNodeById(id); return (n.pos[1] + n.size[1]"
                      " + app.canvas.ds.offset[1]) * app.canvas.ds.scale }", node)
    top = front.js("() => app.canvas.canvas.getBoundingClientRect().top")
    assert panel.evaluate(below) <= bottom + top + 1, "the panel leaves its node"


def test_shows_the_error_of_a_file_that_does_not_fit(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", FITS))
    assert front.run()[0] == "execution_success"
    other = write_adapter(front, f"other-{front.renderer}", ["joint_blocks.0.x.attn.qkv"])
    front.js("([id, file]) => { app.graph.getNodeById(id).widgets[0].value = file }", [node, other])
    kind, data = front.run()
    front.look_at(node)
    front.screenshot("report-failed")
    assert kind == "execution_error" and data["node_type"] == "AdapterLabLoader"
    expect(front.report(node).locator(".verdict.failed")).to_contain_text("Nothing in")
    front.page.keyboard.press("Escape")


def test_survives_undo_and_another_tab(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", FITS))
    assert front.run()[0] == "execution_success"
    front.report(node).evaluate("(element) => element.id = 'before'")
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    front.js(f"() => {{ {tracker}.captureCanvasState();"
             f" app.graph.getNodeById({node}).pos = [0, 500]; {tracker}.captureCanvasState() }}")
    front.js(f"async () => await {tracker}.undo()")
    front.page.wait_for_timeout(1000)
    expect(front.report(node).locator(".verdict.all")).to_contain_text("3 of 3")
    assert front.page.locator("#before").count() == 0, "undo did not build the nodes anew"
    front.js("async () => await app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    front.page.wait_for_timeout(1000)
    back = "Workspace.PreviousOpenedWorkflow"
    front.js(f"async () => await app.extensionManager.command.execute('{back}')")
    front.page.wait_for_timeout(1500)
    expect(front.report(node).locator(".verdict.all")).to_contain_text("3 of 3")


def test_works_in_a_subgraph(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", FITS))
    front.js("(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])) }", node)
    front.page.wait_for_timeout(500)
    assert front.run()[0] == "execution_success"
    text = front.js("""() => [...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes)
      .find((n) => n.type === "AdapterLabLoader").widgets.find((w) => w.name === "report")
      .element.textContent""")
    assert text.startswith("3 of 3 modules matched")


def test_text_can_be_selected_and_copied(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", FITS))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    before = front.js("(id) => [...app.graph.getNodeById(id).pos]", node)
    front.report(node).locator(".verdict").click(click_count=3)
    assert "3 of 3 modules matched" in front.js("String(getSelection())")
    front.js("() => addEventListener('copy', (e) => setTimeout(() => window.kept ="
             " !e.defaultPrevented), true)")
    front.page.keyboard.press("Control+c")
    front.page.wait_for_function("window.kept === true", timeout=3000)
    assert front.js("(id) => [...app.graph.getNodeById(id).pos]", node) == before


def test_draws_the_loss_of_a_training_run(front: FrontEnd) -> None:
    train = {"run_name": f"loss {front.renderer}", "steps": 6, "save_every": 3}
    nodes = [("UNETLoader", {"unet_name": MODEL}), ("AdapterLabDatasetLoad", {"name": "demo_star"}),
             ("AdapterLabDatasetLoad", {"name": "demo_star_validation"}),
             ("AdapterLabTrain", train)]
    links = [(0, "MODEL", 3, "model"), (1, "dataset", 3, "dataset"),
             (2, "dataset", 3, "validation")]
    node = front.build(nodes, links)[3]
    assert front.run()[0] == "execution_success"
    front.look_at(node, 1.2)
    front.screenshot("report-loss")
    panel = front.report(node)
    expect(panel).to_contain_text(re.compile(r"\b6 steps"))
    lines = panel.locator("svg.loss polyline").evaluate_all(
        "(all) => all.map((line) => [line.getAttribute('class'), line.points.numberOfItems])")
    assert lines == [["batch", 6], ["mean", 6], ["held-out", 3]]
    expect(panel.locator("svg.loss circle")).to_have_count(3)
    box = panel.locator("svg.loss").bounding_box()
    assert box and box["width"] > 200 and box["height"] > 80


@pytest.mark.parametrize("kind", ["AdapterLabConfig", "AdapterLabOptimizer", "KSampler"])
def test_nodes_that_report_nothing_have_no_panel(front: FrontEnd, kind: str) -> None:
    (node,) = front.build([(kind, {})], [])
    names = front.js("(id) => app.graph.getNodeById(id).widgets.map((w) => w.name)", node)
    assert names and "report" not in names
