"""Runs workflows in the real front end and makes their thumbnails of the pictures they give.

    ADAPTER_LAB_COMFYUI=... python tests/web/thumbnail.py [NAME ...]

Left half without the adapter, right half with it: a prompt a row, the same seeds in both halves.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from frontend import CHECKOUT, FLAGS, FrontEnd
from server import Server

CELL, GAP, EACH = 118, 4, 4  # pixels, pixels, pictures of a prompt
SHOWN = 2  # of them in each half
SAVED = """() => Object.fromEntries(app.graph.nodes.filter((n) => n.type === "SaveImage").map(
  (n) => [n.widgets[0].value.split("/").pop(), app.nodeOutputs[n.id].images]))"""


def thumbnail(halves: list[list[Path]]) -> Image.Image:
    rows = len(halves[0]) // EACH
    side = SHOWN * (CELL + GAP)
    sheet = Image.new("RGB", (2 * side + 2 * GAP, rows * (CELL + GAP) - GAP), "#202020")
    for half, files in enumerate(halves):
        for row in range(rows):
            for column, file in enumerate(files[row * EACH : row * EACH + SHOWN]):
                cell = Image.open(file).resize((CELL, CELL), Image.Resampling.LANCZOS)
                x = half * (side + 3 * GAP) + column * (CELL + GAP)
                sheet.paste(cell, (x, row * (CELL + GAP)))
    return sheet


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
            thumbnail(halves).save(path.with_suffix(".jpg"), quality=88, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or [path.stem for path in (CHECKOUT / "workflows").glob("*.json")])
