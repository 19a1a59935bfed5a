"""The report on the node, in both renderers."""

from __future__ import annotations

import re

import pytest
import torch
from frontend import FrontEnd
from playwright.sync_api import Locator, expect
from safetensors.torch import save_file

MODEL = "adapter_lab_demo_flux.safetensors"
SHAPES = {
    "double_blocks.0.img_attn.qkv": (384, 128),
    "single_blocks.0.linear1": (896, 128),
    "single_blocks.1.linear2": (128, 640),
}


def write_adapter(front: FrontEnd, name: str, modules: list[str]) -> str:
    """File name of a LoRA of rank 2 that fits the demo model where that has `modules`."""
    tensors = {}
    for module in modules:
        out, width = SHAPES.get(module, (4, 4))
        tensors[f"diffusion_model.{module}.lora_down.weight"] = torch.ones(2, width)
        tensors[f"diffusion_model.{module}.lora_up.weight"] = torch.zeros(out, 2)
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
    folder = front.server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    front.js("async () => await app.refreshComboInNodes()")
    return f"{name}.safetensors"


def load(front: FrontEnd, file: str, **values: str) -> int:
    """A graph that loads `file`; id of its loader."""
    loader = ("AdapterLabLoader", {"adapter_name": file, **values})
    nodes = [("UNETLoader", {"unet_name": MODEL}), loader, ("PreviewAny", {})]
    links = [(0, "MODEL", 1, "model"), (1, "report", 2, "source")]
    return front.build(nodes, links)[1]


def size(front: FrontEnd, node: int) -> list[float]:
    return front.js("(id) => [...app.graph.getNodeById(id).size]", node)


def rows(panel: Locator) -> list[str]:
    """The texts of the rows that are in the document."""
    return panel.locator("tbody tr:not(.gap)").all_inner_texts()


def test_shows_what_matched_again_when_cached(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
    panel = front.report(node)
    expect(panel).to_contain_text("Reports here after a run")
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    front.screenshot("report-all")
    expect(panel.locator(".verdict.all")).to_contain_text("3 of 3 modules")
    expect(panel).to_be_visible()
    panel.evaluate("(element) => element.replaceChildren()")
    assert front.run()[0] == "execution_success"
    expect(panel.locator(".verdict.all")).to_contain_text("3 of 3 modules")


def test_opens_to_a_table_and_folds_again(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    panel, before = front.report(node), size(front, node)
    expect(panel.locator("table")).not_to_be_visible()
    panel.locator("summary").click()
    front.page.wait_for_timeout(400)
    front.screenshot("report-opened")
    headings = panel.locator("th").all_inner_texts()
    assert headings == ["module", "target"], "what is the same for all modules is said once"
    expect(panel.locator(".shared")).to_have_text("Each: LoRA, rank 2, scale 1")
    assert rows(panel) == [f"{name}\t{name}" for name in SHAPES]
    assert size(front, node)[1] > before[1] and size(front, node)[0] > before[0]
    assert front.run()[0] == "execution_success"
    expect(panel.locator("table")).to_be_visible()
    panel.locator("summary").click()
    front.page.wait_for_timeout(400)
    assert size(front, node) == before
    # A node that the user made larger is as large again.
    front.js("(id) => app.graph.getNodeById(id).setSize([600, 800])", node)
    for _ in range(2):
        panel.locator("summary").click()
        front.page.wait_for_timeout(400)
    assert size(front, node) == [600, 800]


def test_is_used_by_keyboard(front: FrontEnd) -> None:
    many = [f"single_blocks.{i}.linear1" for i in range(20)]
    node = load(front, write_adapter(front, f"keys-{front.renderer}", many))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    panel = front.report(node)
    panel.locator("summary").focus()
    expect(panel.locator("table")).to_be_visible()
    front.page.keyboard.press("Space")
    expect(panel.locator("table")).not_to_be_visible()
    front.page.keyboard.press("Enter")
    expect(panel.locator("table")).to_be_visible()
    front.page.keyboard.press("Tab")
    front.page.keyboard.type("BLOCKS.7 linear")
    expect(panel.get_by_role("status")).to_have_text("1 of 20")
    assert rows(panel)[0].startswith("single_blocks.7.linear1")
    front.page.keyboard.press("Control+a")
    front.page.keyboard.press("Delete")
    assert front.js("(id) => !!app.graph.getNodeById(id)", node), "the key deleted the node"
    assert len(rows(panel)) == 20


def test_lists_what_did_not_match(front: FrontEnd) -> None:
    wrong = [f"single_blocks.{i}.linear1" for i in range(10, 30)]
    node = load(front, write_adapter(front, f"partly-{front.renderer}", [*SHAPES, *wrong]))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    panel = front.report(node)
    front.screenshot("report-partly")
    expect(panel.locator(".verdict.partly")).to_contain_text("3 of 23 modules")
    # Open by itself, what is missing on top.
    expect(panel.locator(".missed")).to_have_count(20)
    assert rows(panel)[19].startswith("single_blocks.29.linear1\t") and len(rows(panel)) == 23
    assert rows(panel)[20].split("\t")[0] == next(iter(SHAPES))
    tall, seen = panel.locator(".view").evaluate("(e) => [e.scrollHeight, e.clientHeight]")
    assert tall > seen > 60
    below = "(e) => e.getBoundingClientRect().bottom"
    bottom = front.js("(id) => { const n = app.graph.getNodeById(id); return (n.pos[1] + n.size[1]"
                      " + app.canvas.ds.offset[1]) * app.canvas.ds.scale }", node)
    top = front.js("() => app.canvas.canvas.getBoundingClientRect().top")
    assert panel.evaluate(below) <= bottom + top + 1, "the panel leaves its node"


def test_long_table_is_rendered_where_it_is_looked_at(front: FrontEnd) -> None:
    wrong = [f"single_blocks.{i}.linear1" for i in range(100, 2100)]
    node = load(front, write_adapter(front, f"long-{front.renderer}", [*SHAPES, *wrong]))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    panel = front.report(node)
    expect(panel.locator("table")).to_have_attribute("aria-rowcount", "2004")
    assert 0 < len(rows(panel)) < 100
    panel.locator(".view").evaluate("(e) => { e.scrollTop = e.scrollHeight }")
    front.page.wait_for_timeout(300)
    front.screenshot("report-long")
    assert rows(panel)[-1].startswith(list(SHAPES)[-1]) and len(rows(panel)) < 100
    last = panel.locator("tbody tr:not(.gap)").last
    expect(last).to_be_in_viewport()
    panel.get_by_role("searchbox").fill("blocks.1234.")
    expect(panel.get_by_role("status")).to_have_text("1 of 2003")
    assert [row.split("\t")[0] for row in rows(panel)] == ["single_blocks.1234.linear1"]


def test_names_are_text_and_not_markup(front: FrontEnd) -> None:
    name = "<img src=x onerror='window.parsed=true'>"
    node = load(front, write_adapter(front, f"markup-{front.renderer}", [*SHAPES, name]))
    assert front.run()[0] == "execution_success"
    panel = front.report(node)
    expect(panel.locator(".missed").first).to_contain_text(name)
    assert panel.locator("img").count() == 0 and not front.js("() => window.parsed")


def test_draws_the_schedule_and_shows_strengths(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)),
                schedule="0@0, 2@0.25, 1@1", block_weights="single_blocks.1 = 0.5")
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    front.screenshot("report-schedule")
    panel = front.report(node)
    expect(panel.locator("svg.schedule")).to_be_visible()
    dots = panel.locator("svg.schedule circle").evaluate_all(
        "(all) => all.map((dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value])")
    (left, bottom), (peak, top), (right, middle) = dots
    assert (peak - left) / (right - left) == pytest.approx(0.25)
    assert (bottom - middle) / (bottom - top) == pytest.approx(0.5)
    expect(panel).to_contain_text("bypass, because the strength changes")
    assert panel.locator("th").all_inner_texts() == ["module", "target", "block weight"]
    strengths = [row.split("\t")[2] for row in rows(panel)]
    assert strengths == ["1", "1", "0.5"]


def test_shows_the_error_of_a_file_that_does_not_fit(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
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
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
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
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
    front.js("(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])) }", node)
    front.page.wait_for_timeout(500)
    assert front.run()[0] == "execution_success"
    text = front.js("""() => [...app.rootGraph.subgraphs.values()].flatMap((g) => g.nodes)
      .find((n) => n.type === "AdapterLabLoader").widgets.find((w) => w.name === "report")
      .element.textContent""")
    assert "3 of 3 modules" in text


def test_text_can_be_selected_and_copied(front: FrontEnd) -> None:
    node = load(front, write_adapter(front, f"fits-{front.renderer}", list(SHAPES)))
    assert front.run()[0] == "execution_success"
    front.look_at(node)
    before = front.js("(id) => [...app.graph.getNodeById(id).pos]", node)
    front.report(node).locator(".verdict").click(click_count=3)
    assert "3 of 3 modules" in front.js("String(getSelection())")
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


def test_leaves_out_of_pictures_what_is_not_finite(front: FrontEnd) -> None:
    drawn = """async () => {
      const [{ chart }, { bars }] = await Promise.all(["chart", "bars"].map(
        (name) => import(`/extensions/adapter-lab/lib/${name}.mjs`)));
      const loss = chart([[1, 1], [2, 0.5], [3, null], [4, 0.25]], [[2, 0.5], [4, null]]);
      const norms = bars([["a.0", null], ["a.1", 2]]);
      return [loss.innerHTML, loss.querySelectorAll("circle").length,
        loss.querySelector(".batch").points.numberOfItems, norms.innerHTML,
        norms.querySelectorAll("rect").length, bars([["a.0", null]]),
        chart([[1, null]], []).innerHTML, loss.querySelector("svg").getAttribute("role")];
    }"""
    loss, dots, points, norms, count, nothing, empty, role = front.js(drawn)
    assert "NaN" not in loss + norms + empty and nothing is None
    assert (dots, points, count, role) == (1, 3, 1, "img")
    assert "<title>Loss over 4 steps, mean training loss 1 to 0.25, held-out loss 0.5 to" in loss


@pytest.mark.parametrize("kind", ["AdapterLabPreview", "KSampler"])
def test_nodes_that_report_nothing_have_no_panel(front: FrontEnd, kind: str) -> None:
    (node,) = front.build([(kind, {})], [])
    names = front.js("(id) => app.graph.getNodeById(id).widgets.map((w) => w.name)", node)
    assert names and "report" not in names


def test_inspector_shows_facts_and_where_the_adapter_acts(front: FrontEnd) -> None:
    file = "adapter_lab_demo_star.safetensors"
    nodes = [("UNETLoader", {"unet_name": MODEL}), ("AdapterLabFile", {"adapter_name": file}),
             ("AdapterLabInspect", {}), ("PreviewImage", {})]
    links = [(0, "MODEL", 2, "model"), (1, "adapter", 2, "adapter"), (2, "plot", 3, "images")]
    node = front.build(nodes, links)[2]
    assert front.run()[0] == "execution_success"
    front.look_at(node, 1.2)
    front.screenshot("report-inspect")
    panel = front.report(node)
    expect(panel.locator(".verdict.all")).to_contain_text("19 of 19 modules")
    names = panel.locator(".body > dl > dt").all_inner_texts()
    assert {"keys", "ranks", "size"} <= set(names)
    bars = panel.locator("svg.bars rect")
    titles = bars.evaluate_all("(all) => all.map((bar) => bar.textContent.split(':')[0])")
    assert titles == ["double_blocks.0", *(f"single_blocks.{i}" for i in range(3))]
    entry = panel.get_by_text("modelspec.title")
    expect(entry).not_to_be_visible()
    panel.get_by_text("entries of metadata").click()
    expect(entry).to_be_visible()
