"""Runs workflows in the real front end and makes their thumbnails of the pictures they give.

    ADAPTER_LAB_COMFYUI=... python tests/web/thumbnail.py [NAME ...]

Of a workflow that saves sets of pictures: the first and the last, one in each half, a prompt a row,
the same seeds in both. Of another: the picture that it previews.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "demo")]

from frontend import CHECKOUT, FLAGS, FrontEnd  # noqa: E402
from server import Server  # noqa: E402
from summary import sheet  # noqa: E402

CELL, EACH = 118, 4  # pixels, pictures of a prompt
SHOWN = 2  # of them in each half
SHOWN_BY = """() => Object.fromEntries(app.graph.nodes
  .filter((n) => n.type === "SaveImage" || n.type === "PreviewImage")
  .map((n) => [n.type === "PreviewImage" ? "preview" : n.widgets[0].value.split("/").pop(),
    app.nodeOutputs[n.id].images]))"""


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
            picture = thumbnail(server.base, front.js(SHOWN_BY))
            picture.save(path.with_suffix(".jpg"), quality=88, optimize=True)
        browser.close()


def thumbnail(base: Path, shown: dict[str, list[dict]]) -> Image.Image:
    """`shown`: the pictures of each node as ComfyUI names them, by their prefix or "preview"."""
    files = {name: [base / one["type"] / one["subfolder"] / one["filename"] for one in images]
             for name, images in shown.items()}
    halves = [pictures for name, pictures in files.items() if name != "preview"]
    if len(halves) < 2:
        return Image.open(files["preview"][0]).convert("RGB")
    return sheet([halves[0], halves[-1]], len(halves[0]) // EACH, SHOWN, CELL)


if __name__ == "__main__":
    main(sys.argv[1:] or [path.stem for path in (CHECKOUT / "workflows").glob("*.json")])
