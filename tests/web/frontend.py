"""ComfyUI's own front end in Chromium, in one of its two renderers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page
from server import Server

CHECKOUT = Path(os.path.abspath(__file__)).parents[2]
ARTIFACTS = Path(os.environ.get("ADAPTER_LAB_ARTIFACTS", CHECKOUT / "tests" / "artifacts"))
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)
ENDS = ["execution_success", "execution_error", "execution_interrupted"]
SIZE = {"width": 1400, "height": 1000}
READY = "window.app?.vueAppReady && window.app.graph && window.app.extensionManager"
RUN = """async ([ends, seconds]) => {
  const api = window.comfyAPI.api.api;
  const end = new Promise((done) => {
    for (const kind of ends) api.addEventListener(kind, (e) => done([kind, e.detail]));
    setTimeout(() => done(["no end in time", {}]), 1000 * seconds);
  });
  if (!(await app.queuePrompt(0, 1))) return ["refused", {}];
  return end;
}"""
OVERLAPS = """() => {
  const boxes = app.graph.nodes.map((n) => [n.title, n.pos[0], n.pos[1] - 30, n.size[0],
    n.size[1] + 30]);
  const meet = ([, x, y, w, h], [, X, Y, W, H]) => x < X + W && X < x + w && y < Y + H && Y < y + h;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => meet(a, b)).map((b) =>
    `${a[0]} and ${b[0]}`));
}"""
BUILD = """([nodes, links]) => {
  app.graph.clear();
  const made = nodes.map(([type, values], i) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [450 * i, 0];
    for (const [name, value] of Object.entries(values))
      node.widgets.find((w) => w.name === name).value = value;
    return node;
  });
  for (const [from, output, to, input] of links) {
    const slots = [made[from].findOutputSlot(output), made[to].findInputSlot(input)];
    made[from].connect(slots[0], made[to], slots[1]);
  }
  return made.map((node) => node.id);
}"""
LOOK_AT = """([id, scale]) => {
  const node = app.graph.getNodeById(id);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [90 - node.pos[0], 90 - node.pos[1]];
  app.canvas.setDirty(true, true);
}"""


class FrontEnd:
    """A page with the front end open; `errors` collects what its scripts did not catch."""

    def __init__(self, server: Server, browser: Browser, renderer: str) -> None:
        self.server, self.renderer = server, renderer
        server.post("/settings", {"Comfy.TutorialCompleted": True,
                                  "Comfy.VueNodes.Enabled": renderer == "vue"})
        self.page: Page = browser.new_page(viewport=SIZE)
        self.errors: list[str] = []
        self.console: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.console.append(f"{said.type}: {said.text}"))
        self.page.route(lambda url: not url.startswith((server.address, "data:", "blob:")),
                        lambda route: route.abort())
        self.page.goto(server.address)
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_timeout(1000)

    def js(self, code: str, argument: Any = None) -> Any:
        return self.page.evaluate(code, argument)

    def open(self, workflow: dict) -> None:
        self.js("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
        self.page.wait_for_timeout(1200)

    def build(self, nodes: list[tuple[str, dict]], links: list[tuple]) -> list[int]:
        """A graph of (class, widget values), linked by (from, output, to, input); their ids."""
        self.open({"nodes": [], "links": [], "version": 0.4})
        made = self.js(BUILD, [nodes, links])
        self.page.wait_for_timeout(300)
        return made

    def run(self, seconds: float = 120) -> tuple[str, dict]:
        """Press Run; the last event of the job and its data."""
        kind, data = self.js(RUN, [ENDS, seconds])
        self.page.wait_for_timeout(700)
        return kind, data

    def node(self, kind: str) -> int:
        """Id of the only node of class `kind`."""
        (found,) = self.js("(kind) => app.graph.nodes.filter((n) => n.type === kind)"
                           ".map((n) => n.id)", kind)
        return found

    def report(self, node: int) -> Locator:
        """The panel of a node."""
        self.js("(id) => { app.graph.getNodeById(id).widgets.find((w) => w.name === 'report')"
                ".element.dataset.testid = `report-${id}` }", node)
        return self.page.get_by_test_id(f"report-{node}")

    def look_at(self, node: int, scale: float = 1.4) -> None:
        self.js(LOOK_AT, [node, scale])
        self.page.wait_for_timeout(500)

    def overlaps(self) -> list[str]:
        return self.js(OVERLAPS)

    def screenshot(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}-{self.renderer}.png")


def workflow(name: str) -> dict:
    """A shipped workflow, its training and sampling cut to a few steps."""
    found = json.loads((CHECKOUT / "workflows" / f"{name}.json").read_text("utf-8"))
    trains = [node for node in found["nodes"] if node["type"] == "AdapterLabTrain"]
    most = max((node["widgets_values"][1] for node in trains), default=0)
    for node in trains:
        # Name, steps and batch size; one that goes on from another still does.
        run, steps = node["widgets_values"][:2]
        node["widgets_values"][:3] = [f"test {run}", 6 * steps // most, 4]
        node["widgets_values"][5] = 3
    # Of fewer steps MagCache skips none.
    cached = any(node["type"] == "AdapterLabMagCache" for node in found["nodes"])
    for node in found["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 10 if cached else 3
    return found
