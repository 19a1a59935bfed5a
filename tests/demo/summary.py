"""The demo's figures, read off the pictures it made and off what its nodes said."""

import re

import measure
import numpy as np
from PIL import Image

CONCEPT = "star"
CELL, GAP = 96, 4  # pixels
SAID = re.compile(r"^(?:held-out loss|training loss) .*|^[\d.]+ s/step$", re.MULTILINE)


def figures(prompt, result, base, name):
    """Lines of a summary: losses and pace, then what the pictures show without and with."""
    trained = "\n".join(
        text for node, text in result.texts.items()
        if prompt[node]["class_type"] == "AdapterLabTrain"
    )  # fmt: skip
    captions, saved = _captions(prompt, result), _saved(prompt, result, base)
    lines = SAID.findall(trained)
    if not captions or not saved:
        return lines
    for title, files in saved.items():
        asked = [caption for caption in captions for _ in range(len(files) // len(captions))]
        readings = [measure.read(np.asarray(Image.open(f).convert("RGB"))) for f in files]
        lines.append(f"{title}: {_shares(list(zip(asked, readings, strict=True)))}")
    path = base / "output" / "adapter_lab" / f"{name}.png"
    sheet(list(saved.values()), len(captions)).save(path)
    return [*lines, f"from left to right, a prompt a row: {path}"]


def sheet(halves, rows, shown=None, cell=CELL):
    """Pictures of each half side by side, a prompt a row, at most ``shown`` of each prompt."""
    each = len(halves[0]) // rows
    shown = min(each, shown or each)
    side = shown * (cell + GAP)
    size = (len(halves) * (side + 3 * GAP) - 4 * GAP, rows * (cell + GAP) - GAP)
    image = Image.new("RGB", size, "#202020")
    for i, half in enumerate(halves):
        for row in range(rows):
            for column, file in enumerate(half[row * each : row * each + shown]):
                picture = Image.open(file).resize((cell, cell), Image.Resampling.LANCZOS)
                corner = i * (side + 3 * GAP) + column * (cell + GAP), row * (cell + GAP)
                image.paste(picture, corner)
    return image


def _saved(prompt, result, base):
    """Title of each node that saved pictures -> its files, what is without an adapter first."""
    found = {}
    for node, output in result.outputs.items():
        if prompt[node]["class_type"] == "SaveImage":
            images = [base / o["type"] / o["subfolder"] / o["filename"] for o in output["images"]]
            found[prompt[node]["_meta"]["title"]] = images
    return dict(sorted(found.items(), key=lambda pair: "ithout" not in pair[0]))


def _captions(prompt, result):
    """Captions of the prompts in the order in which the samplers get them."""
    lists = [n["inputs"] for n in prompt.values() if n["class_type"] == "CreateList"]
    sources = [link[0] for inputs in lists for link in inputs.values() if isinstance(link, list)]
    texts = {node: result.texts.get(node) or prompt[node]["inputs"].get("text") for node in sources}
    return [text for text in texts.values() if isinstance(text, str) and text]


def _shares(readings):
    """How many of the pictures show the colour and shape that their prompt asks for."""
    parts = []
    for name, wanted in ((f"{CONCEPT}s", True), ("other shapes", False)):
        part = [(c.split(), r) for c, r in readings if (c.split()[1] == CONCEPT) == wanted]
        right = sum((r.colour, r.shape) == tuple(words[:2]) for words, r in part)
        parts += [f"{right} of {len(part)} {name} as asked"] if part else []
    return ", ".join(parts)
