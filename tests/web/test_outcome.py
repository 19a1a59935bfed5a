"""What the file tools show on their nodes, and how they are wired, in both renderers."""

from __future__ import annotations

import pytest
import torch
from frontend import CHECKOUT, FrontEnd, workflow
from playwright.sync_api import Locator, expect
from safetensors.torch import load_file, save_file

MODEL = "adapter_lab_demo_flux.safetensors"
STAR, DUSK = "adapter_lab_demo_star.safetensors", "adapter_lab_demo_dusk.safetensors"
DEMO = CHECKOUT / "workflows" / "demo"
LAYER = "single_blocks.0.linear2"


def run(front: FrontEnd, node: int) -> Locator:
    """Runs the graph and brings the node into view; its panel."""
    kind, data = front.run()
    assert kind == "execution_success", data
    front.look_at(node)
    return front.report(node)


def rows(panel: Locator) -> dict[str, list[str]]:
    """Name of each row that is in the document -> its other cells."""
    cells = [text.split("\t") for text in panel.locator("tbody tr:not(.gap)").all_inner_texts()]
    return {name: rest for name, *rest in cells}


def headings(panel: Locator) -> list[str]:
    return panel.locator("th").all_inner_texts()


def write_lora(front: FrontEnd, name: str, modules: list[str], rank: int) -> str:
    """File name of a random LoRA of square modules."""
    make, tensors = torch.Generator().manual_seed(0), {}
    for module in modules:
        for key, shape in (("down", (rank, 128)), ("up", (128, rank))):
            tensors[f"diffusion_model.{module}.lora_{key}.weight"] = torch.randn(
                shape, generator=make
            )
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(rank))
    folder = front.server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    front.js("async () => await app.refreshComboInNodes()")
    return f"{name}.safetensors"


def tail(adapter: dict[str, torch.Tensor], rank: int) -> dict[str, float]:
    """Module -> relative error of the best approximation of that rank (Eckart and Young)."""
    ends = {key.removesuffix(".lora_up.weight") for key in adapter if "lora_up" in key}
    found = {}
    for name in ends:
        up, down = (adapter[f"{name}.lora_{end}.weight"].double() for end in ("up", "down"))
        s = torch.linalg.svdvals(up @ down)
        found[name.removeprefix("diffusion_model.")] = float(s[rank:].norm() / s.norm())
    return found


def test_errors_have_bars_and_can_be_filtered(front: FrontEnd) -> None:
    nodes = [("AdapterLabFile", {"adapter_name": STAR}), ("AdapterLabResize", {"rank": 2}),
             ("PreviewAny", {})]
    links = [(0, "adapter", 1, "adapter"), (1, "report", 2, "source")]
    node = front.build(nodes, links)[1]
    panel = run(front, node)
    expect(panel.locator(".verdict.all")).to_be_visible()
    front.screenshot("outcome-resize")
    assert headings(panel) == ["name", "note", "error"]
    expect(panel.locator(".shared")).to_have_text("Each: LoRA 2")
    errors = tail(load_file(DEMO / "loras" / STAR), 2)
    shown = {name: float(cells[-1].rstrip("%")) for name, cells in rows(panel).items()}
    assert shown == pytest.approx({name: 100 * error for name, error in errors.items()}, rel=0.01)
    shares = panel.locator("tbody td:last-child").evaluate_all(
        "(all) => all.map((cell) => Number(cell.style.getPropertyValue('--share')))")
    largest = max(errors.values())
    wanted = [errors[name] / largest for name in shown]
    assert [share for share in shares if share] == pytest.approx(wanted, abs=0.002)
    panel.get_by_role("searchbox").fill("linear2")
    expect(panel.get_by_role("status")).to_have_text("3 of 19")
    assert [name.endswith(".linear2") for name in rows(panel)] == [True] * 3


def test_merge_grows_a_socket_for_each_adapter(front: FrontEnd) -> None:
    two = write_lora(front, f"two-{front.renderer}", ["double_blocks.0.img_attn.proj", "x"], 2)
    nodes = [("AdapterLabFile", {"adapter_name": STAR}), ("AdapterLabFile", {"adapter_name": two}),
             ("AdapterLabMerge", {"ratios": "1, -0.5"}), ("PreviewAny", {})]
    links = [(0, "adapter", 2, "adapters.adapter0"), (1, "adapter", 2, "adapters.adapter1"),
             (2, "report", 3, "source")]
    node = front.build(nodes, links)[2]
    grown = front.js("(id) => app.graph.getNodeById(id).inputs.map((i) => i.name)", node)
    assert [name for name in grown if name.startswith("adapters.")] == [
        f"adapters.adapter{i}" for i in range(3)
    ]
    panel = run(front, node)
    front.screenshot("outcome-merge")
    merged = rows(panel)
    assert headings(panel)[:2] == ["name", "result"] and len(merged) == 20
    assert merged["double_blocks.0.img_attn.proj"][0] == "LoRA 10"
    assert (merged["double_blocks.0.img_attn.qkv"][0], merged["x"][0]) == ("LoRA 8", "LoRA 2")


def test_warnings_colour_the_verdict(front: FrontEnd) -> None:
    nodes = [("AdapterLabFile", {"adapter_name": STAR}),
             ("AdapterLabMerge", {"method": "kohya"}), ("PreviewAny", {})]
    links = [(0, "adapter", 1, "adapters.adapter0"), (0, "adapter", 1, "adapters.adapter1"),
             (1, "report", 2, "source")]
    panel = run(front, front.build(nodes, links)[1])
    front.screenshot("outcome-warning")
    expect(panel.locator(".verdict.partly")).to_be_visible()
    expect(panel.locator("pre .warning").first).to_contain_text("Warning:")
    expect(panel.locator("pre .warning").first).to_be_visible()


def test_extract_takes_menu_and_path_and_lists_what_is_left_out(front: FrontEnd) -> None:
    name = f"tuned-{front.renderer}.safetensors"
    tuned = load_file(DEMO / "diffusion_models" / MODEL)
    make = torch.Generator().manual_seed(0)
    change = torch.outer(torch.randn(128, generator=make), torch.randn(640, generator=make))
    tuned[f"{LAYER}.weight"] += 0.02 * change
    tuned["img_in.bias"] += 0.25
    folder = front.server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tuned, folder / name)
    front.js("async () => await app.refreshComboInNodes()")
    from_menu = {"base_model": MODEL, "tuned_model": name, "rank": 4, "others": "leave out"}
    node = front.build([("AdapterLabExtract", from_menu)], [])[0]
    panel = run(front, node)
    front.screenshot("outcome-extract")
    found = rows(panel)
    assert list(found) == ["img_in.bias", LAYER], "what was left out comes first"
    expect(panel.locator("tr.ignored")).to_have_count(1)
    expect(panel.locator(".shared")).to_contain_text("LoRA 4")
    nodes = [("AdapterLabFile", {"adapter_name": STAR}),
             ("AdapterLabBake", {"model_file": MODEL, "dtype": "fp32",
                                 "filename_prefix": f"web {front.renderer}"}),
             ("AdapterLabExtract", {"base_model": MODEL, "rank": 8})]
    links = [(0, "adapter", 1, "adapter"), (1, "path", 2, "tuned_model")]
    _, bake, extract = front.build(nodes, links)
    panel = run(front, extract)
    expect(panel.locator(".verdict.all")).to_contain_text("19 LoRA")
    expect(front.report(bake).locator(".verdict.all")).to_contain_text("19 of 19 modules")


def test_says_only_what_is_worth_it(front: FrontEnd) -> None:
    """No table without rows, and no line of progress after the run."""
    nodes = [("AdapterLabFile", {"adapter_name": STAR}),
             ("AdapterLabSave", {"filename_prefix": f"web {front.renderer}"})]
    node = front.build(nodes, [(0, "adapter", 1, "adapter")])[1]
    panel = run(front, node)
    expect(panel.locator(".verdict.all")).to_contain_text("saved 57 tensors")
    expect(panel.locator("table")).to_have_count(0)
    kinds = front.js("(id) => app.graph.getNodeById(id).widgets.map((w) => w.type)", node)
    assert "adapter_lab_report" in kinds and "progressText" not in kinds


def test_a_workflow_of_fewer_inputs_still_opens(front: FrontEnd) -> None:
    shipped = workflow("convert_formats")
    shipped["nodes"] = [n for n in shipped["nodes"] if n["type"] == "AdapterLabSave"][:1]
    (save,) = shipped["nodes"]
    shipped["links"] = []
    kept = save["widgets_values"][:3]
    save["widgets_values"] = kept
    save["inputs"] = [one for one in save["inputs"] if one["name"] not in ("inexact", "rank")]
    save["inputs"][0]["link"] = None
    front.open(shipped)
    values = front.js("(id) => Object.fromEntries(app.graph.getNodeById(id).widgets"
                      ".map((w) => [w.name, w.value]))", save["id"])
    assert [values[name] for name in ("filename_prefix", "key_format", "dtype")] == kept
    assert (values["inexact"], values["rank"]) == ("svd", 0)


def test_modules_that_are_all_alike_are_said_once(front: FrontEnd) -> None:
    drawn = """async (reports) => {
      const { render } = await import("/extensions/adapter-lab/lib/report.mjs");
      return reports.map((report) => {
        const made = render({ text: "done", ...report }, document.createElement("div"));
        return [made.querySelector(".shared")?.textContent,
          [...made.querySelectorAll("th")].map((one) => one.textContent)];
      });
    }"""
    row = {"made": "LoRA", "rank": 4, "error": 0.00001, "note": ""}
    alike, none = {"a": row, "b": row}, {"a": {**row, "error": None}}
    told = front.js(drawn, [{"rows": alike}, {"rows": alike, "left_out": {"c": "noise"}},
                            {"rows": {}, "left_out": {"c": "noise"}}, {"rows": none}])
    assert told == [["Each: LoRA 4, error < 0.01%", ["name"]],
                    ["Each: LoRA 4, error < 0.01%", ["name", "note"]],
                    [None, ["name", "note"]], ["Each: LoRA 4", ["name"]]]
