"""Runs workflows in the real front end and makes their thumbnails of the pictures they give.

    ADAPTER_LAB_COMFYUI=... python tests/web/thumbnail.py [NAME ...]

Left half without the adapter, right half with it: a prompt a row, the same seeds in both halves.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "demo")]

from frontend import CHECKOUT, FLAGS, FrontEnd  # noqa: E402
from server import Server  # noqa: E402
from summary import sheet  # noqa: E402

CELL, EACH = 118, 4  # pixels, pictures of a prompt
SHOWN = 2  # of them in each half
SAVED = """() => Object.fromEntries(app.graph.nodes.filter((n) => n.type === "SaveImage").map(
  (n) => [n.widgets[0].value.split("/").pop(), app.nodeOutputs[n.id].images]))"""


def main(names: list[str]) -> None:
    comfyui = os.environ["ADAPTER_LAB_COMFYUI"]
    chromium = os.environ.get("ADAPTER_LAB_CHROMIUM", "/usr/bin/chromium")
    with Server(comfyui) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        front = FrontEnd(server, browser, "canvas")
        for name in names:
            path = CHECKOUT / "workflows" / f"{name}.json"
            front.open(json.loads(path.read_text("utf-8")))
            kind, data = front.run(seconds=1800)
            if kind != "execution_success":
                sys.exit(f"{name}: {kind} {data.get('exception_message', data)}")
            saved = front.js(SAVED)
            halves = [[server.base / "output" / one["subfolder"] / one["filename"]
                       for one in saved[half]] for half in ("before", "after")]
            picture = sheet(halves, len(halves[0]) // EACH, SHOWN, CELL)
            picture.save(path.with_suffix(".jpg"), quality=88, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or [path.stem for path in (CHECKOUT / "workflows").glob("*.json")])
