"""The demo's figures, read off the pictures it made and off what its nodes said."""

import re

import measure
import numpy as np
from PIL import Image

CONCEPT = "star"
SAID = re.compile(r"^(?:held-out loss|training loss) .*|^[\d.]+ s/step$", re.MULTILINE)


def figures(prompt, result, base):
    """Lines of a summary: losses and pace, then what the pictures show without and with."""
    trained = "\n".join(
        text for node, text in result.texts.items()
        if prompt[node]["class_type"] == "AdapterLabTrain"
    )  # fmt: skip
    return SAID.findall(trained) + [
        f"{title}: {_shares(readings)}" for title, readings in _read(prompt, result, base)
    ]


def _read(prompt, result, base):
    """Title of each node that saved pictures, with (caption, Reading) of each picture."""
    captions = _captions(prompt, result)
    for node, output in result.outputs.items():
        if prompt[node]["class_type"] != "SaveImage" or not captions:
            continue
        files = [base / o["type"] / o["subfolder"] / o["filename"] for o in output["images"]]
        each = len(files) // len(captions)
        readings = [measure.read(np.asarray(Image.open(f).convert("RGB"))) for f in files]
        asked = [caption for caption in captions for _ in range(each)]
        yield prompt[node]["_meta"]["title"], list(zip(asked, readings, strict=True))


def _captions(prompt, result):
    """Captions of the prompts in the order in which the samplers get them."""
    lists = [n["inputs"] for n in prompt.values() if n["class_type"] == "CreateList"]
    sources = [link[0] for inputs in lists for link in inputs.values() if isinstance(link, list)]
    return [result.texts[node] for node in sources if node in result.texts]


def _shares(readings):
    """How many of the pictures show the colour and shape that their prompt asks for."""
    parts = []
    for name, wanted in ((f"{CONCEPT}s", True), ("other shapes", False)):
        part = [(c.split(), r) for c, r in readings if (c.split()[1] == CONCEPT) == wanted]
        right = sum((r.colour, r.shape) == tuple(words[:2]) for words, r in part)
        parts.append(f"{right} of {len(part)} {name} as asked")
    return ", ".join(parts)
