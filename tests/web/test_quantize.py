"""What the two nodes that quantise show on them, in both renderers."""

from __future__ import annotations

import re

import pytest
from frontend import CHECKOUT, FrontEnd
from playwright.sync_api import Locator, expect
from safetensors.torch import load_file

MODEL = "adapter_lab_demo_flux.safetensors"
DEMO = CHECKOUT / "workflows" / "demo"
LIST = "double_blocks.0.img_attn.qkv"


def run(front: FrontEnd, node: int) -> Locator:
    """Runs the graph and brings the node into view; its panel."""
    kind, data = front.run()
    assert kind == "execution_success", data
    front.look_at(node)
    return front.report(node)


def cells(panel: Locator) -> list[list[str]]:
    return [t.split("\t") for t in panel.locator("tbody tr:not(.gap)").all_inner_texts()]


def test_layers_come_by_their_error_then_what_was_kept(front: FrontEnd) -> None:
    nodes = [("AdapterLabQuantLoader", {"unet_name": MODEL, "format": "int8_row", "keep": LIST}),
             ("PreviewAny", {})]
    node = front.build(nodes, [(0, "MODEL", 1, "source")])[0]
    panel = run(front, node)
    expect(panel.locator(".verdict.all")).to_contain_text("to int8, scaled by row")
    front.js("(id) => { app.graph.getNodeById(id).setSize([620, 900]) }", node)
    front.page.wait_for_timeout(300)
    front.look_at(node, 1)
    front.screenshot("quantize-loader")
    heads = panel.locator("th").all_inner_texts()
    assert heads[0] == "layer" and heads[-1] == "error"
    panel.get_by_role("searchbox").fill("%")
    layers = cells(panel)
    errors = [float(row[-1].rstrip("%")) for row in layers]
    assert len(errors) > 10 and errors == sorted(errors, reverse=True) and errors[-1] > 0
    weights = load_file(DEMO / "diffusion_models" / MODEL)
    for name, *_, shown in layers[:3]:
        # Of rows with one scale each: max / 127 a step, rounded to the nearest.
        w = weights[f"{name}.weight"].float()
        scale = w.abs().amax(1, keepdim=True) / 127
        error = ((w / scale).round() * scale - w).norm() / w.norm()
        assert float(shown.rstrip("%")) == pytest.approx(100 * float(error), rel=0.01)
    bars = panel.locator("tbody td.fact:last-child").evaluate_all(
        "(all) => all.map((cell) => Number(cell.style.getPropertyValue('--share')))")
    assert bars == pytest.approx([error / errors[0] for error in errors], abs=0.01)
    panel.get_by_role("searchbox").fill("kept")
    kept = dict(row[:2] for row in cells(panel))
    assert kept[LIST] == "kept: as asked" and kept["img_in"].startswith("kept: ")
    assert not {*kept} & {row[0] for row in layers}


def test_file_by_its_path_into_comfyuis_own_loader(front: FrontEnd) -> None:
    name = f"web/{front.renderer}"
    nodes = [("AdapterLabQuantize", {"unet_name": MODEL, "format": "fp8_e4m3",
                                     "filename_prefix": name}),
             ("PreviewImage", {}), ("AdapterLabQuantLoader", {}), ("PreviewAny", {})]
    links = [(0, "plot", 1, "images"), (0, "path", 2, "unet_name"), (2, "MODEL", 3, "source")]
    write, _, again, _ = front.build(nodes, links)
    front.js("(id) => { app.graph.getNodeById(id).setSize([560, 700]) }", write)
    panel = run(front, write)
    front.screenshot("quantize-file")
    expect(panel.locator(".verdict.all")).to_contain_text("to fp8 e4m3, scaled")
    expect(panel.locator("dd", has_text=re.compile(rf"{name}_\d+_.safetensors"))).to_be_visible()
    second = front.report(again)
    expect(second.locator(".verdict.all")).to_contain_text("loaded as it is")
    expect(second.locator("table")).to_have_count(0)


def test_a_column_that_does_not_vary_is_said_once(front: FrontEnd) -> None:
    drawn = """async (reports) => {
      const { render } = await import("/extensions/adapter-lab/lib/report.mjs");
      return reports.map((report) => {
        const made = render({ text: "done", ...report }, document.createElement("div"));
        return [made.querySelector(".shared")?.textContent,
          [...made.querySelectorAll("th")].map((one) => one.textContent)];
      });
    }"""
    row = {"error": 0.02, "saturated": 0, "subnormal": 0, "before": 2_000_000, "after": 1_000_000}
    worse = {**row, "error": 0.03, "subnormal": 0.5}
    told = front.js(drawn, [{"layers": {"a": row, "b": row}, "kept": {}},
                            {"layers": {"a": row}, "kept": {"c": "small"}},
                            {"layers": {"a": worse, "b": row}, "kept": {}}])
    alike = "Each: 2→1 MB, error 2%"
    assert told == [[alike, ["layer"]], [alike, ["layer", "note"]],
                    ["Each: 2→1 MB", ["layer", "subnormal", "error"]]]
